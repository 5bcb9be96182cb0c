"""python -m hashattn_kernels.numba_cpu: compile the kernels that the notebooks use."""

from .warm import main

if __name__ == "__main__":
    main()

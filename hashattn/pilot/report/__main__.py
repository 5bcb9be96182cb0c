"""Write a pilot's report again: python -m hashattn.pilot.report pilot.json --language ja."""

import argparse
import sys
from pathlib import Path

from hashattn.base.errors import HashAttnError
from hashattn.pilot.report.files import save_report
from hashattn.pilot.report.result import load_result
from hashattn.pilot.settings import LANGUAGES


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 1 not (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="hashattn.pilot.report", description=__doc__)
    parser.add_argument("result", type=Path, help="the pilot.json of a pilot")
    parser.add_argument("--language", choices=LANGUAGES, help="as the pilot's if not given")
    parser.add_argument(
        "--folder", type=Path, help="where to write; beside the pilot.json if not given"
    )
    options = parser.parse_args(arguments)
    try:
        result = load_result(options.result)
        result["language"] = options.language or result["language"]
        files = save_report(result, options.folder or options.result.parent)
    except HashAttnError as error:
        print(error, file=sys.stderr)
        return 1
    print(files.html)
    return 0


if __name__ == "__main__":
    sys.exit(main())

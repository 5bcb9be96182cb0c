"""Speed: one decode step of one layer and of whole models, against dense peers and the roofline.

`python -m hashattn.reproduce.bench cpu` and `gpu` are what `make bench` and `make gpu` run;
notebook 04 measures a small part of this and reads the rest from data/reference.
"""

"""One unit of a run, a decoder layer or all outside the layers: read, observed, chosen, passed on, written."""

"""One file a family: what is particular to it. A family module offers ``load``, which gives a LoadedModel."""

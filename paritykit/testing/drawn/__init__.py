"""Tiny seeded models of any causal language model that transformers has, made from its config class alone.

No table of families: what an integer is for is read from the words of its name (``roles``), per-layer lists are cut to
a few layers of every kind (``fields``), what then does not work is mended by what its error says (``search``), and
switches are drawn where they change what is computed (``switches``).
"""

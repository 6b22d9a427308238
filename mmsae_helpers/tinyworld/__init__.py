"""The embedded world: rendered scenes, a small English about them, and models trained on both.

``scenes`` renders, ``language`` speaks, ``tokenizer`` spells, ``dataset`` packs splits, ``training`` and the family
modules train the checkpoints that ship in ``checkpoints/``, and ``build`` rebuilds them from scratch. ``real`` gives a
language model that was not made here the same eyes.
"""

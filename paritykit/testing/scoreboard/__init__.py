"""How well ParityKit does what it is for: planted faults found, placed and explained, and clean pairs left alone.

``python -m paritykit.testing.scoreboard --out FOLDER --page docs/scoreboard.md`` plants every fault of the table in
tiny models, at full strength, at ten times the noise floor and at twice, in ``nano`` and in real vLLM, in float32 and
bfloat16; it also runs the same engines without any fault. What comes out is counted and written down, beside what
simpler judges say of the very same captures.

``plan`` says which trials there are, ``ground`` opens engines and makes the reference's captures, ``runs`` carries a
trial out, ``outcome`` is what is kept of it, ``rates`` counts, ``page`` writes.
"""

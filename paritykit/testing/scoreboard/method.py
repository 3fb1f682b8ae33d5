"""How the board is made, in words, for its page."""

from __future__ import annotations

from paritykit.testing.scoreboard.judges import LEAST_COSINE, TOP

METHOD = {
    "opening": "How often ParityKit finds what is wrong, says where and why, and keeps quiet where nothing is. "
    "[Planted faults](faults.md) are mistakes that real engines made in public; each is planted in tiny models, and "
    "many in models with trained weights, which are then compared with Hugging Face as `paritykit run` does. `tox run "
    "-e scoreboard` writes this page: no number in it is written by hand. Behind each share are its counts, and the "
    "interval that holds the true rate 95 times of 100 if trials were independent (Wilson).",
    "strength": "Most faults have a strength: a share of the wrong result, mixed into the right one. Each is planted "
    "as it is, and cut until its own point is off by ten times and by twice the noise floor. *Found*: a check that the "
    "fault names fails, with the noise floor as the only tolerance. The next two columns are of those found that have "
    "a place, the last two of those found. What is cut is not the mistake any more but a mixture of it with what is "
    "right, and most causes are tested as the whole mistake. In the last row is what has no effect: a factor before a "
    "norm, for example, that the norm takes away. Nothing that is computed from the point differs, so it passes, and "
    "the run tells the point as one that means something else.",
    "class": "At ten times the floor or louder.",
    "engine": "The same, by where the faults were planted.",
    "judges": "The same captures, judged as engines' own tests do: the candidate against Hugging Face in the "
    "candidate's own dtype, fed the same tokens. `assert_close` with torch's default tolerances of the dtype, at "
    "every point that both sides have or at the logits alone; the cosine of each layer's output, at least "
    f"{LEAST_COSINE}; and, as vLLM's tests of models do with logprobs, whether each side's choice is among the "
    f"other's {TOP} best, here at every position. A share under *no fault* is one of false alarms.",
    "clean": "The same engines with nothing planted: every tiny model that the engine runs, on one rank and on two, on "
    "the smoke cases and a ragged batch, and models under the conditions that faults need (chunks, small blocks, a "
    "crowded cache). In vLLM also drawn architectures (`drawn:cohere`), made from their config class alone; one whose "
    "logits differ is told apart, for there the engine computes something else. Null faults run the machinery of "
    "planting and change nothing. A *false alarm* is a verdict "
    "`fail`; `inconclusive` says that nothing can be said, as where rounding sends a token to another expert.",
    "measured": "Truth is Hugging Face one precision above the candidate on the candidate's weights, the noise floor "
    "that of Hugging Face in the candidate's dtype against it ([verdicts](verdicts.md)). A fault's ratio is the "
    "candidate's `rel_l2` over that of the noise floor, or of half a unit in the last place where that is more, at the "
    "point where the fault is, in the case where it is largest. Strengths are looked for along a power law until the "
    "ratio is within 1.3 times of what is wanted, six tries at most; the ratio that was reached is the one that is "
    "shown. Where all passes every module is replayed once, what fails is replayed and explained as in any run. "
    "*Exact* is the point that the fault table says, or where the engine does not show that, the nearest module "
    "around it. *Within one module*: that one, the one around "
    "it, one right inside it, or next to it in order of execution. Faults in loading are held against the weight "
    "ledger first, those of files against the audit, and those that only an engine's own schedules show against these "
    "too; what the ledger and the audit say comes first, as in a run.\n\n"
    "By default each fault is planted in one model at every strength "
    "in both dtypes, in turn through the models that it fits, in nano and in vLLM; in nano also as it is and at ten "
    "times the floor in two more models, and each third one in trained weights. Faults of files that are found before "
    "an engine starts are tried once. "
    "`--full` tries everything everywhere.",
}
"""Paragraphs by the part of the page that they are in."""

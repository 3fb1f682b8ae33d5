"""The causes as data: what `paritykit explain` says of each. Torch-free."""

from __future__ import annotations

from typing import Any

TABLE: tuple[dict[str, Any], ...] = (
    {
        "code": "PK101",
        "name": "rope-pairing",
        "what": (
            "Rotary embedding turns other pairs of a head's elements: neighbours instead of halves, or the reverse."
        ),
        "tested": (
            "The reference's rotation is measured from its keys before and after, and applied to the other pairs."
        ),
        "look": (
            "is_neox_style (vLLM), rope_interleave, rope_traditional; whether q and k rows were permuted when the "
            "checkpoint was converted."
        ),
        "seen": ("vLLM #941", "SGLang #13495", "mlx-examples #170"),
        "tests": ("rotary:pairing",),
    },
    {
        "code": "PK102",
        "name": "sliding-window",
        "what": "A layer sees more or less of the past than its config says.",
        "tested": (
            "Attention is computed anew from the recorded queries, keys and values with no window, one position "
            "more or less, the config's, and the length at which the difference begins. Where keys have another "
            "layer kind's rotary base, whether attention has its window too."
        ),
        "look": (
            "sliding_window and layer_types; whether prefill and decode both get the layer's own window and not "
            "that of its KV cache group."
        ),
        "seen": ("vLLM #14896", "vLLM #17180", "litgpt #1995"),
        "tests": ("attention:window", "rotary:layer_kind"),
    },
    {
        "code": "PK103",
        "name": "rope-theta",
        "what": "The rotary base is another than the config's, or that of another kind of layer.",
        "tested": (
            "The candidate's frequencies are measured from its keys; a base is fitted, known numbers first, and "
            "the keys are predicted with it."
        ),
        "look": (
            "rope_theta and rope_parameters (transformers 5), rope_local_base_freq; a default that hides a key "
            "that is not read."
        ),
        "seen": ("TGI #2212", "vLLM #1841"),
        "tests": ("rotary:theta",),
    },
    {
        "code": "PK104",
        "name": "rope-partial",
        "what": "Another part of each head is rotated than in the reference, or nothing.",
        "tested": "Keys are predicted with other rotary dimensions, none among them.",
        "look": (
            "partial_rotary_factor, rotary_dim, layers without rotary embedding; whether rotated keys are written back."
        ),
        "seen": ("vLLM #41185", "vLLM #23918"),
        "tests": ("rotary:partial_dims",),
    },
    {
        "code": "PK105",
        "name": "rope-scaling",
        "what": (
            "Rotary frequencies are scaled otherwise than the config says, or cos and sin are multiplied by "
            "another factor."
        ),
        "tested": (
            "Frequencies and magnitude are measured from the candidate's keys and the keys are predicted with them."
        ),
        "look": (
            "rope_scaling or rope_parameters: rope_type, factor, attention_factor; whether both spellings are read."
        ),
        "seen": ("vLLM #6693", "TGI #783", "mlx-lm #1606", "vLLM #5628"),
        "tests": ("rotary:scaling",),
    },
    {
        "code": "PK106",
        "name": "position-shift",
        "what": "Tokens get other positions than their own.",
        "tested": (
            "For every token the position is found whose rotation gives the candidate's key; and all are rotated as "
            "they lie in memory, from token to token at the distance of heads."
        ),
        "look": (
            "Positions of decoded tokens, of later chunks of a prompt, beyond the rotary table, and of padded rows; "
            "shape and strides of what a rotary kernel is handed."
        ),
        "seen": ("vLLM #2088", "vLLM #37884", "vLLM #10388"),
        "tests": ("rotary:positions", "strides:head_strides"),
    },
    {
        "code": "PK107",
        "name": "attention-scale",
        "what": "Scores are multiplied by another factor than the reference's.",
        "tested": (
            "Attention is computed anew with other factors, those made of the config's numbers first, then a "
            "fitted one."
        ),
        "look": "query_pre_attn_scalar, attention_multiplier, head_dim that is not hidden_size / heads.",
        "seen": ("vLLM #29908",),
        "tests": ("attention:scale",),
    },
    {
        "code": "PK108",
        "name": "softcap",
        "what": "Scores or logits are capped where they should not be, not capped, or by another number.",
        "tested": "Attention, or the logits, are computed anew without the cap, with usual caps and with a fitted one.",
        "look": "attn_logit_softcapping and final_logit_softcapping; which attention backends support a cap.",
        "seen": ("SGLang #5622",),
        "tests": ("attention:softcap", "head:softcap"),
    },
    {
        "code": "PK109",
        "name": "mask",
        "what": "Tokens see what they should not, or do not see what they should.",
        "tested": (
            "Attention is computed anew without the causal mask, with it one off, added as a number, and with "
            "each chunk alone."
        ),
        "look": (
            "is_causal, the mask's dtype and how it is applied; chunks after the first, and merging of partial results."
        ),
        "seen": ("vLLM #11801", "mlx-lm #27", "vLLM #22034"),
        "tests": ("attention:mask",),
    },
    {
        "code": "PK110",
        "name": "norm-eps",
        "what": "A norm adds another epsilon than the config says.",
        "tested": "The norm is computed anew from its recorded input with other epsilons.",
        "look": "Which config key the norm's epsilon is read from, and whether a reused block has one of its own.",
        "seen": ("SGLang #9884",),
        "tests": ("norm:eps",),
    },
    {
        "code": "PK111",
        "name": "norm-offset",
        "what": "1 is added to a norm's weight that holds it already, or is missing.",
        "tested": "The norm is computed anew with its weight 1 larger and 1 smaller.",
        "look": "Gemma-like norms compute 1 + weight; converted files may hold the sum already.",
        "seen": ("utensils/mold #1074", "utensils/mold #1078"),
        "tests": ("norm:offset",),
    },
    {
        "code": "PK112",
        "name": "norm-kind",
        "what": "Another kind of norm is computed, its weight is not used, or there is none.",
        "tested": "Layer norm for RMS norm and back, no weight, no bias, no norm, per head and over all heads.",
        "look": "Which norm class the module uses, and whether the norm is called at all on this path.",
        "seen": ("vLLM #40411", "vLLM #8106", "TGI #2459"),
        "tests": ("norm:kind",),
    },
    {
        "code": "PK120",
        "name": "bias-missing",
        "what": "A linear layer's bias is not added.",
        "tested": "The bias is taken from the reference's output.",
        "look": "Loading rules that skip surplus biases; layers built with bias=False.",
        "seen": ("vLLM #8442", "ANEForge #253"),
        "tests": ("weights:bias_missing",),
    },
    {
        "code": "PK121",
        "name": "bias-doubled",
        "what": "A linear layer's bias is added twice.",
        "tested": "The bias is added to the reference's output.",
        "look": "Whether the kernel adds it already; on two ranks, whether each rank adds it (tp-bias).",
        "tests": ("weights:bias_doubled",),
    },
    {
        "code": "PK122",
        "name": "rows-permuted",
        "what": "Rows of a weight, or heads, are in another order, or one projection is taken for another.",
        "tested": (
            "Rotary permutations, q, k and v for each other, heads in another order, and every feature searched "
            "for among the reference's."
        ),
        "look": (
            "How the fused projection is split (sizes, order), whether a conversion permuted q and k, how kv "
            "heads are repeated."
        ),
        "seen": ("llama2.c #286", "vLLM #34243", "vLLM #13687", "gpt-fast 776b733"),
        "tests": ("weights:rows_permuted", "attention:permuted"),
    },
    {
        "code": "PK123",
        "name": "gate-up-swapped",
        "what": "Gate and up of an MLP are taken for each other, or cut out of the fused projection otherwise.",
        "tested": "The other projection is put in its place, as halves and column by column.",
        "look": "The order in gate_up_proj, and halves against interleaved columns.",
        "seen": ("vLLM #29273", "SGLang #13113"),
        "tests": ("weights:gate_up_swapped",),
    },
    {
        "code": "PK124",
        "name": "activation-kind",
        "what": "An MLP's activation is another function, or its input is clamped.",
        "tested": (
            "The activation is computed anew from its recorded input with other functions, and with a limit that "
            "is read off the candidate."
        ),
        "look": "hidden_act against hidden_activation, exact gelu against its tanh form, swiglu_limit.",
        "seen": ("vLLM #32686", "vLLM #40245", "vLLM #41574", "transformers #40197"),
        "tests": ("mlp:activation_kind", "moe:activation"),
    },
    {
        "code": "PK125",
        "name": "residual",
        "what": (
            "The residual is not added, added twice, scaled or taken from another place; or a module's output is "
            "not used."
        ),
        "tested": "The sum is made anew from the layer's recorded tensors in every simple combination.",
        "look": (
            "Fused norms that add the residual themselves; what a pipeline stage hands on; a layer that is left out."
        ),
        "seen": ("SGLang #19070", "vLLM #37622", "vLLM #10327"),
        "tests": ("residual:residual",),
    },
    {
        "code": "PK126",
        "name": "scale-factor",
        "what": "An output is multiplied by a constant too much, or too few.",
        "tested": (
            "One factor is fitted to all rows; config numbers and square roots are recognised. In a cache also one for "
            "each key or value of each head."
        ),
        "look": "Embedding, residual and logit multipliers, and scales of a quantised cache or value.",
        "seen": ("vLLM #34813", "vLLM #31175", "mlx-lm #764"),
        "tests": ("scale:scale_factor",),
    },
    {
        "code": "PK130",
        "name": "weight-corrupt",
        "what": "A weight holds other numbers than the checkpoint, in one place, a few rows, or transposed.",
        "tested": (
            "The weight's element is found that the difference is a multiple of; the weight is transposed; check "
            "`weights` compares every element."
        ),
        "look": "The file's digest, a second file with the same key, a loader that reuses its buffer.",
        "seen": ("vLLM #53537", "vLLM #5005", "gpt-fast 776b733"),
        "tests": ("weights:weight_corrupt",),
    },
    {
        "code": "PK131",
        "name": "weight-not-loaded",
        "what": "A weight or bias was never written and holds what memory held.",
        "tested": (
            "Zeros, and one vector added to every position, are put in its place; nothing in the output is like "
            "the reference's. Check `weights` sees it directly."
        ),
        "look": "Loading rules and name prefixes; parameters that the checkpoint does not have.",
        "seen": ("vLLM #21725", "vLLM #740", "vLLM #1501", "SGLang #16235"),
        "tests": ("weights:not_loaded", "moe:one_expert"),
    },
    {
        "code": "PK132",
        "name": "weight-shared-wrongly",
        "what": "A module uses the weight of another: of another layer, or the head the embedding's.",
        "tested": (
            "The module's output is computed anew with the weights of layers around it, and with the embedding's."
        ),
        "look": "tie_word_embeddings and its level in the config; iterators that reuse a buffer.",
        "seen": ("SGLang #15398", "SGLang #18024", "vLLM #39650"),
        "tests": ("weights:weight_shared",),
    },
    {
        "code": "PK133",
        "name": "lm-head",
        "what": "The output head's weight is not the checkpoint's, or its rows are in another order.",
        "tested": (
            "The logits are searched for among the reference's, in any order; whether another matrix makes their "
            "difference of the input is read off the other positions."
        ),
        "look": "Whether a tied head is tied, padding of the vocabulary, a bias of the head.",
        "seen": ("vLLM #3344", "SGLang #5759", "mlx-lm #1143"),
        "tests": ("head:lm_head",),
    },
    {
        "code": "PK140",
        "name": "kv-slot",
        "what": "Keys and values of some positions are written to another slot, or not at all.",
        "tested": (
            "Keys that are wrong in a few positions only are searched for among all keys; attention is computed "
            "anew with what is found."
        ),
        "look": "Slot mapping at block edges, padded rows of a batch, the cache's offset in decode.",
        "seen": ("mlx-lm #1024", "vLLM #37884", "vLLM #31540"),
        "tests": ("cache:slot",),
    },
    {
        "code": "PK141",
        "name": "kv-block-table",
        "what": "Attention reads the blocks of another request, or too few.",
        "tested": (
            "Attention is computed anew over other requests' keys, over blocks in another order and over fewer "
            "positions."
        ),
        "look": "Rows of the block table against rows of the batch, lengths, high block numbers.",
        "seen": ("vLLM #7018", "vLLM #47671", "TGI #3324"),
        "tests": ("cache:block_table",),
    },
    {
        "code": "PK142",
        "name": "kv-stale",
        "what": "The cache holds keys that another request, or another context, left there.",
        "tested": "Wrong keys are searched for among the reference's keys of other cases at the same positions.",
        "look": "What a block is known by in the prefix cache, the length of a hit, what is kept over preemption.",
        "seen": ("vLLM #12603", "vLLM #36708", "vLLM #18957"),
        "tests": ("cache:stale",),
    },
    {
        "code": "PK150",
        "name": "tp-shard",
        "what": "A rank holds another rank's part of a weight.",
        "tested": (
            "Features are searched for in whole parts of the reference's; products are made anew with each rank's "
            "part of the weight."
        ),
        "look": "The loader's rank and offsets, fused weights that are cut before they are split, replicated kv heads.",
        "seen": ("vLLM #2208", "vLLM #8055", "vLLM #36242", "TGI #2203"),
        "tests": ("parallel:tp_shard",),
    },
    {
        "code": "PK151",
        "name": "tp-reduce",
        "what": "The sum over ranks is missing, made twice, an average, or lacks a rank.",
        "tested": "Each rank's part of the product is made anew from input and weight, and summed in these ways.",
        "look": "reduce_results, fused all-reduce and norm, a module that is reduced already.",
        "seen": ("SGLang #19070", "vLLM #28277", "vLLM #39844"),
        "tests": ("parallel:tp_reduce", "moe:partial_sums"),
    },
    {
        "code": "PK152",
        "name": "tp-bias",
        "what": "Every rank adds the whole bias before the sum.",
        "tested": "The bias is added to the reference's output once for every further rank.",
        "look": "Row-parallel layers add their bias on one rank only, or after the sum.",
        "tests": ("parallel:tp_bias",),
    },
    {
        "code": "PK153",
        "name": "vocab-shard",
        "what": "Tokens are looked up, or logits joined, with parts of the vocabulary that begin elsewhere.",
        "tested": (
            "The embedding is looked up anew with tokens one off, in one rank's part or all; logits are searched "
            "for in whole parts."
        ),
        "look": "Padding of the vocabulary, the start of each rank's part, the order in which parts are gathered.",
        "seen": ("vLLM #18597", "litgpt #1334"),
        "tests": ("head:vocab_shard",),
    },
    {
        "code": "PK160",
        "name": "moe-routing",
        "what": "Tokens go to other experts, or to another number of them.",
        "tested": (
            "Every expert's output is made anew; which of them the candidate mixed is solved for, and compared "
            "with the router's choice."
        ),
        "look": "top-k, groups and their mask, a correction bias, the order of experts in the fused weight.",
        "seen": ("SGLang #3705", "vLLM #21586", "vllm-ascend #11391"),
        "tests": ("moe:routing",),
    },
    {
        "code": "PK161",
        "name": "moe-scale",
        "what": "The experts' shares are right but for a factor: not renormalised, or scaled.",
        "tested": "Each row is compared with the reference's times one factor, and times the chosen odds' sum.",
        "look": "norm_topk_prob, routed_scaling_factor, and which of two backends applies it.",
        "seen": ("SGLang #8333", "SGLang #8511", "vLLM #43769"),
        "tests": ("moe:shares",),
    },
    {
        "code": "PK170",
        "name": "pooling-type",
        "what": "A sequence is pooled otherwise: last, first or all tokens.",
        "tested": "The pooled row is made anew from the last hidden states as last, first, mean and maximum.",
        "look": "1_Pooling/config.json, the pooler's default for the architecture.",
        "seen": ("vLLM #15929", "vLLM #20930"),
        "tests": ("pooling:pooling_type",),
    },
    {
        "code": "PK171",
        "name": "pooled-activation",
        "what": "What was pooled goes through another function, or is normalised or not.",
        "tested": "The reference's pooled row goes through softmax, sigmoid, normalisation and their absence.",
        "look": "Normalisation of embeddings, softmax or sigmoid of scores and how many labels there are.",
        "tests": ("pooling:pooled_activation",),
    },
    {
        "code": "PK172",
        "name": "tuple-output",
        "what": "A module's tuple is passed on whole or its wrong element is taken.",
        "tested": (
            "The reference's other tensors of the same shape are put in its place; the first row alone is repeated."
        ),
        "look": "Linear layers that return (output, bias), and `[0]` applied to what is a tensor already.",
        "seen": ("vLLM #8896", "vLLM #14177"),
        "tests": ("pooling:tuple_output",),
    },
    {
        "code": "PK180",
        "name": "dtype-rounding",
        "what": "A tensor is rounded to half precision in a model that computes in more bits.",
        "tested": (
            "All of the candidate's numbers are numbers of half precision, near the reference's; weights and "
            "inputs are rounded and the product made anew."
        ),
        "look": "Casts around norms, routers, heads and the residual; modules that ignore the dtype asked for.",
        "seen": ("vLLM #42379", "vLLM #19592", "vLLM #35617", "mlx-lm #102"),
        "tests": ("dtype:rounding", "moe:rounded_router"),
    },
    {
        "code": "PK190",
        "name": "step-changed",
        "what": "One step of the reference's code is left out, or done otherwise.",
        "tested": (
            "Where no other cause fits, the reference's module runs again on its own inputs with one edit at a time: "
            "of its code, its parameters, its children or its settings."
        ),
        "look": "The engine's code for the file and line of the reference that the evidence names.",
    },
    {
        "code": "PK199",
        "name": "unknown",
        "what": "None of the causes that are tested explains the difference.",
        "tested": "Named only where nothing else fits; the evidence says what can be seen.",
        "look": "The extent: which positions, features and ranks; then the code of the module that is named.",
    },
)

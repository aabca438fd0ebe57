"""What a golden records of a model of transformers, and the checks that make it worth recording.

Every forward pass is whole and without a cache, on a model whose rotary embedding remembers no earlier pass, so that a
golden says what transformers computes for a sequence of that length and nothing else.
"""

import copy

import torch

# Where the best two tokens come closer than this, a rounding error may decide: a continuation ends before.
MIN_MARGIN = 0.02
MIN_GREEDY = 4
# The same for the last expert taken and the first left out; so large that f16 does not decide either.
MIN_EXPERT_MARGIN = 4e-3


def logits_of(model, tokens):
    """[tokens, vocabulary]. Dynamic frequencies grow with the longest sequence seen, so each pass starts afresh."""
    base = model.base_model
    rotary = getattr(base, "rotary_emb", None)
    if rotary is not None and "dynamic" in str(getattr(rotary, "rope_type", "")):
        base.rotary_emb = type(rotary)(model.config)
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def logprobs_of(model, tokens):
    return torch.log_softmax(logits_of(model, tokens).double(), dim=-1)


def rows_of(logprobs, positions, num_top, fixed_ids):
    """Rounded: six digits are 100 times finer than the tightest tolerance."""
    rows = []
    for position in positions:
        row = logprobs[position]
        top = torch.topk(row, num_top)
        rows.append(
            {
                "position": position,
                "top": [[int(i), round(float(v), 6)] for i, v in zip(top.indices, top.values)],
                "fixed": [round(float(row[i]), 6) for i in fixed_ids],
            }
        )
    return rows


def greedy(model, tokens, num_tokens):
    """The continuation, up to the first near tie, and the log-probability of each of its tokens."""
    tokens, continuation, logprobs = list(tokens), [], []
    while len(continuation) < num_tokens:
        best = torch.topk(logprobs_of(model, tokens + continuation)[-1], 2)
        if float(best.values[0] - best.values[1]) < MIN_MARGIN:
            break
        continuation.append(int(best.indices[0]))
        logprobs.append(round(float(best.values[0]), 6))
    return continuation, logprobs


def next_logprobs(logprobs, tokens):
    """Of each token of a prompt but the first, given those before it."""
    return [round(float(row[token]), 6) for row, token in zip(logprobs, tokens[1:])]


def expert_margin(model, tokens):
    """The least distance of a chosen expert's logit to that of one left out; infinite where there are no experts."""
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate") and hasattr(module, "top_k")]
    margins = [float("inf")]

    def look(module, inputs, _):
        logits = torch.nn.functional.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight)
        ordered = logits.sort(dim=-1, descending=True).values
        margins.append(float((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min()))

    hooks = [router.register_forward_hook(look) for router in routers]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return min(margins)


def errors_in(model, dtype, prompts):
    """How far the same weights and prompts lead in `dtype`: the largest difference and the mean divergence from f32."""
    rounded = copy.deepcopy(model).to(dtype)
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is not None:
        # Frequencies stay in f32 when transformers loads a model in half precision.
        rounded.base_model.rotary_emb = type(rotary)(model.config)
    worst, divergence, num_rows = 0.0, 0.0, 0
    for tokens in prompts:
        exact, actual = logprobs_of(model, tokens), logprobs_of(rounded, tokens)
        worst = max(worst, float((exact - actual).abs().max()))
        divergence += float((exact.exp() * (exact - actual)).sum())
        num_rows += len(tokens)
    return {"max": round(worst, 6), "kl": divergence / num_rows}

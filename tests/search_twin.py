"""What the searches must do, written plainly in float64: slow, one text after the other, no cache.

``logits(ids) -> [V]`` and ``hidden(ids) -> [T, C]`` are the model.
"""

from __future__ import annotations

import numpy as np


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def processed(scores, ids, prompt, params, ends, bias=()):
    """What the parameters make of scores [V] behind ``ids``, of which ``prompt`` were given."""
    ids, scores = [int(i) for i in ids], np.array(scores, np.float64)
    generated = ids[prompt:]
    for token, amount in [*params.logit_bias.items(), *bias]:
        scores[token] += amount
    for token in set(ids):
        p = params.repetition_penalty
        scores[token] = scores[token] / p if scores[token] > 0 else scores[token] * p
    for token in set(generated):
        scores[token] -= params.presence_penalty
        scores[token] -= params.frequency_penalty * generated.count(token)
    n = params.no_repeat_ngram_size
    if n and len(ids) >= n:
        for i in range(len(ids) - n + 1):
            if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
                scores[ids[i + n - 1]] = -np.inf
    for word in [*params.bad_words, *([i] for i in params.suppress_tokens)]:
        if len(word) <= len(ids) + 1 and ids[len(ids) - len(word) + 1 :] == list(word[:-1]):
            scores[word[-1]] = -np.inf
    if len(generated) < params.min_new_tokens:
        scores[list(ends)] = -np.inf
    forced = None
    if len(generated) < len(params.forced_tokens):
        forced = params.forced_tokens[len(generated)]
    if len(generated) == params.max_new_tokens - 1 and params.forced_eos_token_id is not None:
        forced = params.forced_eos_token_id
    if forced is not None:
        scores[:] = -np.inf
        scores[forced] = 0
    return scores


def best(scores, n):
    """Ids of the n largest scores that are not banned, ties to the lowest id."""
    order = np.argsort(-scores, kind="stable")[:n]
    return [int(i) for i in order if scores[i] > -np.inf]


class _Hypotheses:
    """The finished texts of a group: transformers 4's BeamHypotheses."""

    def __init__(self, width, params):
        self.width, self.params, self.texts, self.done = width, params, [], False

    def add(self, total, tokens, length):
        self.texts.append((total / length**self.params.length_penalty, tokens))
        self.texts.sort(key=lambda text: -text[0])
        del self.texts[self.width :]

    def is_done(self, best_total, length):
        if len(self.texts) < self.width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.params.max_new_tokens
        return self.texts[-1][0] >= best_total / length**self.params.length_penalty


def group_beams(logits, prompt, params, ends):
    """[(score, tokens)] of the ``n`` best texts, as ``_group_beam_search`` of transformers 4 finds
    them; but a group that is done penalizes no token of the others."""
    prompt = [int(i) for i in prompt]
    width = params.num_beams // params.num_beam_groups
    groups = [[(0.0, [])] for _ in range(params.num_beam_groups)]
    found = [_Hypotheses(width, params) for _ in groups]
    for length in range(1, params.max_new_tokens + 1):
        chosen = []
        for g, beams in enumerate(groups):
            if found[g].done:
                continue
            bias = [(t, -params.diversity_penalty * chosen.count(t)) for t in set(chosen)]
            candidates = []
            for total, tokens in beams:
                ids = prompt + tokens
                scores = log_softmax(logits(ids))
                scores = processed(scores, ids, len(prompt), params, ends, bias)
                for token in best(scores, max(2, 1 + len(ends)) * width):
                    candidates.append((total + scores[token], [*tokens, token]))
            candidates.sort(key=lambda c: -c[0])
            del candidates[max(2, 1 + len(ends)) * width :]
            groups[g] = []
            for rank, (total, tokens) in enumerate(candidates):
                if tokens[-1] not in ends:
                    groups[g].append((total, tokens))
                elif rank < width:
                    found[g].add(total, tokens[:-1], length)
                if len(groups[g]) == width:
                    break
            chosen += [tokens[-1] for _, tokens in groups[g]]
            found[g].done = found[g].is_done(candidates[0][0], length)
        if all(f.done for f in found):
            break
    for beams, f in zip(groups, found, strict=True):
        if not f.done:
            for total, tokens in beams:
                f.add(total, tokens, len(tokens))
    texts = [text for f in found for text in f.texts]
    return sorted(texts, key=lambda text: -text[0])[: params.n]


def contrastive(logits, hidden, prompt, params, ends):
    """The tokens of a contrastive search, the end token left out."""
    ids = [int(i) for i in prompt]
    while len(ids) - len(prompt) < params.max_new_tokens:
        scores = processed(logits(ids), ids, len(prompt), params, ends)
        context = hidden(ids).astype(np.float64)
        context /= np.linalg.norm(context, axis=1, keepdims=True)
        ratings = {}
        for token in best(scores, params.top_k):
            state = hidden([*ids, token])[-1].astype(np.float64)
            alike = np.max(context @ (state / np.linalg.norm(state)))
            probability = np.exp(log_softmax(scores)[token])
            alpha = params.penalty_alpha
            ratings[token] = (1 - alpha) * probability - alpha * alike
        ids.append(max(ratings, key=ratings.get))
        if ids[-1] in ends:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]

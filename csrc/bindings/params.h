// SamplingParams from Python, and log-probabilities to it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "core/sampling.h"

namespace gptx {

// From a dict of its fields; those that are missing have their defaults.
inline SamplingParams sampling_params_from(const pybind11::dict& d) {
  SamplingParams p;
  const auto read = [&](const char* name, auto& field) {
    if (d.contains(name)) field = d[name].cast<std::decay_t<decltype(field)>>();
  };
  std::vector<std::pair<int32_t, float>> logit_bias;
  read("logit_bias", logit_bias);
  for (const auto& [token, bias] : logit_bias) p.logit_bias.push_back({token, bias});
  read("repetition_penalty", p.repetition_penalty);
  read("presence_penalty", p.presence_penalty);
  read("frequency_penalty", p.frequency_penalty);
  read("dry_multiplier", p.dry_multiplier);
  read("dry_base", p.dry_base);
  read("dry_allowed_length", p.dry_allowed_length);
  read("dry_range", p.dry_range);
  read("dry_breakers", p.dry_breakers);
  read("no_repeat_ngram_size", p.no_repeat_ngram_size);
  read("bad_words", p.bad_words);
  read("temperature", p.temperature);
  read("top_n_sigma", p.top_n_sigma);
  read("top_k", p.top_k);
  read("top_p", p.top_p);
  read("min_p", p.min_p);
  read("typical_p", p.typical_p);
  read("seed", p.seed);
  read("logprobs", p.logprobs);
  return p;
}

inline pybind11::list logprob_pairs(const std::vector<TokenLogprob>& top) {
  pybind11::list out;
  for (const TokenLogprob& t : top) out.append(pybind11::make_tuple(t.token, t.logprob));
  return out;
}

}  // namespace gptx

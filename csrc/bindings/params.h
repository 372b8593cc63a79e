// SamplingParams from Python, and log-probabilities to it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <sstream>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/sampling.h"

namespace gptx {

// Whether the sampler can work with them at all; what makes sense is checked by gptx/sampling.py.
inline void check_sampling(const SamplingParams& p) {
  const auto text = [](double value) {
    std::ostringstream out;
    out << value;
    return out.str();
  };
  const auto check = [&](const char* name, double value, double least, double most) {
    if (value >= least && value <= most) return;
    throw ParameterError(name, text(value), text(least) + " to " + text(most));
  };
  constexpr double kLarge = std::numeric_limits<double>::max();  // finite
  for (const TokenBias& bias : p.logit_bias) {
    if (!(bias.bias < std::numeric_limits<float>::infinity())) {
      throw ParameterError("logit_bias", std::to_string(bias.bias), "finite numbers or -inf");
    }
  }
  check("repetition_penalty", p.repetition_penalty, std::numeric_limits<double>::min(), kLarge);
  check("presence_penalty", p.presence_penalty, -kLarge, kLarge);
  check("frequency_penalty", p.frequency_penalty, -kLarge, kLarge);
  check("dry_multiplier", p.dry_multiplier, 0, kLarge);
  check("dry_base", p.dry_base, 0, kLarge);
  check("dry_allowed_length", static_cast<double>(p.dry_allowed_length), 0, 1e18);
  check("dry_range", static_cast<double>(p.dry_range), 0, 1e18);
  check("no_repeat_ngram_size", static_cast<double>(p.no_repeat_ngram_size), 0, 1e18);
  check("temperature", p.temperature, 0, kLarge);
  check("top_n_sigma", p.top_n_sigma, 0, kLarge);
  check("top_k", static_cast<double>(p.top_k), 0, 1e18);
  check("top_p", p.top_p, 0, 1);
  check("min_p", p.min_p, 0, 1);
  check("typical_p", p.typical_p, 0, 1);
  check("logprobs", p.logprobs, -1, kLarge);
}

// From a dict of its fields; those that are missing have their defaults. Throws ParameterError.
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
  check_sampling(p);
  return p;
}

inline pybind11::list logprob_pairs(const std::vector<TokenLogprob>& top) {
  pybind11::list out;
  for (const TokenLogprob& t : top) out.append(pybind11::make_tuple(t.token, t.logprob));
  return out;
}

}  // namespace gptx

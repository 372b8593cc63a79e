// How a token is chosen from logits, on every backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace gptx {

struct TokenBias {
  int32_t token;
  float bias;
};

// Ranges are checked by gptx/sampling.py. What changes logits acts first, then the filters, both in the order
// of the fields; those that transformers has are its logits processors of the same names, in its order.
struct SamplingParams {
  std::vector<TokenBias> logit_bias;  // added

  double repetition_penalty = 1.0;    // of every token of the sequence (Keskar et al., 2019)
  double presence_penalty = 0.0;      // subtracted for every token that was generated
  double frequency_penalty = 0.0;     // subtracted for every time it was

  // "Don't repeat yourself": a token that would make the end of the sequence longer than dry_allowed_length
  // equal to an earlier part of it loses dry_multiplier * dry_base^(length - dry_allowed_length).
  double dry_multiplier = 0.0;
  double dry_base = 1.75;
  int64_t dry_allowed_length = 2;
  int64_t dry_range = 0;               // tokens to look back, 0: all
  std::vector<int32_t> dry_breakers;   // tokens that no repetition reaches across

  int64_t no_repeat_ngram_size = 0;    // no n-gram of this length comes twice
  std::vector<std::vector<int32_t>> bad_words;  // sequences that are never completed

  double temperature = 1.0;  // 0: the most likely token, ties to the lowest id
  double top_n_sigma = 0.0;  // keep logits within n standard deviations of the largest, 0: all
  int64_t top_k = 0;         // 0: all
  double top_p = 1.0;        // nucleus (Holtzman et al., 2020)
  double min_p = 0.0;        // share of the largest probability
  double typical_p = 1.0;    // locally typical (Meister et al., 2023)

  uint64_t seed = 0;
  int logprobs = -1;  // report the token's log-probability and so many of the most likely; -1: none

  // Whether no state but (seed, position) is needed, so that a device can go on by itself.
  bool is_stateless() const {
    return is_simple() && repetition_penalty == 1.0;
  }
  // Whether there is nothing but what every backend knows by itself.
  bool is_simple() const {
    return logit_bias.empty() && presence_penalty == 0.0 && frequency_penalty == 0.0 && dry_multiplier == 0.0 &&
           no_repeat_ngram_size == 0 && bad_words.empty() && top_n_sigma == 0.0 && typical_p == 1.0 &&
           logprobs < 0;
  }
};

// Stands for a token where a logit is not finite, or where there is none.
inline constexpr int32_t kNoToken = -1;

// One token to choose.
struct SampleTask {
  size_t logit_row;                    // which of the step's logits
  uint64_t position;                   // of the token in its sequence
  size_t prompt;                       // tokens of the sequence that were given
  std::span<const int32_t> sequence;   // prompt and what was generated
  std::span<const int32_t> banned;     // ids that are never chosen
  std::span<const uint32_t> allowed;   // bit i of word i / 32: whether id i may be chosen; empty: all
  std::span<const TokenBias> bias = {};  // added behind params->logit_bias, to this token alone
  int32_t forced = kNoToken;           // the token, whatever the logits say
  const SamplingParams* params;
};

struct TokenLogprob {
  int32_t token;
  float logprob;
};

// What was chosen. Log-probabilities are those of the model, before penalties, bans and filters.
struct Choice {
  int32_t token = kNoToken;
  float logprob = std::numeric_limits<float>::quiet_NaN();
  std::vector<TokenLogprob> top;  // most likely first, ties to the lowest id
};

// A token that may come next.
struct Candidate {
  int32_t token;
  float score;    // after everything that changes logits
  float logprob;  // the model's own
};

struct Candidates {
  bool finite = false;             // whether the model's logits are
  std::vector<Candidate> best;     // that are not banned: the largest score first, ties to the lowest id
  std::vector<TokenLogprob> top;   // what params.logprobs asks of the model's own distribution
  double log_sum = 0.0;            // log(sum of exp(score)) over all tokens, where the scores were given
};

// One token to look up.
struct ScoreTask {
  size_t logit_row;
  int32_t token;
  size_t top;  // how many of the most likely tokens to report
};

struct Score {
  float logprob = std::numeric_limits<float>::quiet_NaN();  // NaN where a logit is not finite
  int32_t rank = 0;               // tokens that are more likely, or as likely with a lower id
  std::vector<TokenLogprob> top;  // most likely first, ties to the lowest id
};

}  // namespace gptx

// From logits to a token: what changes logits, then the filters, then one draw from the counter RNG.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "core/sampling.h"
#include "cpu/kernel_table.h"

namespace gptx::cpu {

class Sampler {
 public:
  Sampler(size_t vocab_size, const KernelTable& kernels);
  // A copy of a vector lacks what the vector has reserved.
  Sampler(const Sampler& other) : Sampler(other.counts_.size(), *other.kernels_) {}

  // What it has reserved.
  size_t bytes() const noexcept {
    return counts_.capacity() * sizeof(counts_[0]) + heap_.capacity() * sizeof(heap_[0]) +
           candidates_.capacity() * sizeof(candidates_[0]);
  }

  // Chooses the token of a task; `logits` [V] may be changed. Allocates nothing: `out.top` has room for what
  // params.logprobs asks, and everything else was reserved.
  void sample(std::span<float> logits, const SampleTask& task, Choice& out) noexcept;

  // What changes logits, in the order of the fields of SamplingParams; a banned token gets -infinity.
  void adjust(std::span<float> logits, const SampleTask& task);

  // The n tokens of the largest scores. Scores are log softmax(logits) [V], or what is given instead [V], changed
  // as `adjust` does; a forced token has the score 0 and no other one is a candidate.
  void candidates(std::span<const float> logits, std::span<float> given, const SampleTask& task, size_t n,
                  Candidates& out);

 private:
  struct Candidate {
    int32_t id;
    float logit;
    double p;  // its weight
  };
  // Logits become the weights exp((logit - top) / temperature), of which the largest is 1.
  struct Scale {
    double top, temperature;
    double exponent(float logit) const { return (logit - top) / temperature; }
    // No lower logit has this weight; further down than it need be, by more than what is rounded.
    double least_logit(double weight) const { return top + temperature * (std::log(weight) * (1.0 + 1e-6) - 1e-6); }
  };
  // A candidate in the order of a key, ties in that of their ids.
  struct Ranked {
    double key;
    double p;
    int32_t id;
  };

  int32_t choose(std::span<float> logits, const SampleTask& task);

  void penalize_sequence(std::span<float> logits, std::span<const int32_t> sequence, double penalty);
  void penalize_generated(std::span<float> logits, std::span<const int32_t> generated, const SamplingParams& params);
  void penalize_repetition(std::span<float> logits, std::span<const int32_t> sequence, const SamplingParams& params);

  float kth_largest(std::span<const float> logits, size_t k);
  double weigh_all(std::span<const float> logits, const Scale& scale);
  int32_t draw_from_all(std::span<const float> logits, const Scale& scale, double rest) const;
  void keep_from(std::span<const float> logits, double least);
  double weigh(const Scale& scale);
  void keep_top_p(double target);
  void keep_typical(double typical_p, const Scale& scale);
  Ranked last_to_reach(double target);
  int32_t draw(double u) const;

  const KernelTable* kernels_;
  std::vector<int32_t> counts_;  // [V], zeros between calls
  std::vector<float> raw_;       // logits before any change
  std::vector<float> heap_;
  std::vector<double> sums_;     // of the weights of each block of logits
  std::vector<Candidate> candidates_;
  std::vector<Ranked> ranked_;
};

}  // namespace gptx::cpu

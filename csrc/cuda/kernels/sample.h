// From logits to a token: the choice of csrc/cpu/sampler.cpp for the same logits, without sorting. `choose_largest` applies
// the penalty and decides what is greedy; where something is left, `weigh` spreads the exponentials over the device and
// `sample` draws, one block of threads for each. Probabilities are float64; sums that decide what is kept are integers, so
// that their order does not matter.
#pragma once

#include "core/philox.h"
#include "core/sampling.h"
#include "cuda/kernels/sample_items.h"
#include "cuda/kernels/vocabulary.h"

namespace gptx::cuda {

// The largest of all threads' values.
GPTX_DEVICE uint64_t block_max(SampleShared& s, uint64_t x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  if (lane_index() == 0) s.warps[warp_index()] = x;
  sync_block();
  if (thread_index() == 0) {
    for (int w = 1; w < kSampleWarps; ++w) x = s.warps[w] > x ? s.warps[w] : x;
    s.most = x;
  }
  sync_block();
  x = s.most;
  sync_block();
  return x;
}

// The sum of the values of the threads before this one.
GPTX_DEVICE int32_t block_sum_before(SampleShared& s, int32_t x) {
  int32_t sum = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = shuffle(sum, lane_index() - step);
    if (lane_index() >= step) sum += other;
  }
  if (lane_index() == kWarp - 1) s.warps[warp_index()] = static_cast<uint64_t>(sum);
  sync_block();
  int32_t before = sum - x;
  for (int w = 0; w < warp_index(); ++w) before += static_cast<int32_t>(s.warps[w]);
  sync_block();
  return before;
}

// The sum of all threads' values.
GPTX_DEVICE uint64_t block_total(SampleShared& s, uint64_t x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  if (lane_index() == 0) s.warps[warp_index()] = x;
  sync_block();
  x = 0;
  for (int w = 0; w < kSampleWarps; ++w) x += s.warps[w];
  sync_block();
  return x;
}

struct Sampling {
  SampleShared& shared;
  float* const logits;
  const int n;
  const SampleItem& item;
  const double* const weights;  // [V]
  uint32_t least = 0;     // the least key that is kept
  int32_t ties = 0;       // how many of that key are kept, in the order of their ids
  double fixed_point = 0;

  // Makes `least` the largest key for which the keys not below it weigh at least `target`, from 1 to the weight of all.
  template <class Weight>
  GPTX_DEVICE void descend(uint64_t target, Weight weight) {
    uint32_t prefix = 0, mask = 0;
    uint64_t above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = thread_index(); i < kDigits; i += kSampleThreads) shared.low[i] = shared.high[i] = 0;
      sync_block();
      // Neighbours often share a digit: a thread adds its run of one at once.
      uint32_t digit = 0;
      uint64_t run = 0;
      const auto end_run = [&] {
        if (run == 0) return;
        const auto half = static_cast<uint32_t>(run);
        const uint32_t before = atomic_add(&shared.low[digit], half);
        const uint32_t carry = before + half < before ? 1 : 0;
        atomic_add(&shared.high[digit], static_cast<uint32_t>(run >> 32) + carry);
        run = 0;
      };
      for (int i = thread_index(); i < n; i += kSampleThreads) {
        const uint32_t key = key_of(logits[i]);
        if ((key & mask) != prefix || key < least) continue;
        if ((key >> shift & 0xffu) != digit) {
          end_run();
          digit = key >> shift & 0xffu;
        }
        run += weight(i);
      }
      end_run();
      sync_block();
      if (warp_index() == 0) {
        // Each lane has eight digits; the lane where the target is reached from above goes through its own.
        constexpr int kOwn = kDigits / kWarp;
        const auto own = [&](int i) {
          return uint64_t{shared.high[lane_index() * kOwn + i]} << 32 | shared.low[lane_index() * kOwn + i];
        };
        uint64_t sum = 0;
        for (int i = 0; i < kOwn; ++i) sum += own(i);
        uint64_t before = above;  // with the lanes above this one
        for (int lane = kWarp - 1; lane > 0; --lane) {
          const uint64_t other = shuffle(sum, lane);
          if (lane > lane_index()) before += other;
        }
        if (before < target && before + sum >= target) {
          int place = kOwn - 1;
          while (before + own(place) < target) before += own(place--);
          shared.key = prefix | static_cast<uint32_t>(lane_index() * kOwn + place) << shift;
          shared.above = before;
        }
      }
      sync_block();
      prefix = shared.key;
      above = shared.above;
      mask |= 0xffu << shift;
    }
    least = prefix;
    sync_block();
  }

  GPTX_DEVICE bool allowed(int i) const { return logits[i] != -INFINITY; }

  GPTX_DEVICE void keep_top_k() {
    if (item.top_k > 0 && item.top_k < n) descend(static_cast<uint64_t>(item.top_k), [](int) { return uint64_t{1}; });
    ties = n;
  }

  GPTX_DEVICE void keep_top_p() {
    if (!(item.top_p < 1.0)) return;
    const auto weight = [&](int i) { return static_cast<uint64_t>(allowed(i) ? weights[i] * fixed_point : 0.0); };
    uint64_t mine = 0;
    for (int i = thread_index(); i < n; i += kSampleThreads) {
      if (key_of(logits[i]) >= least) mine += weight(i);
    }
    const uint64_t total = block_total(shared, mine);
    const double wanted = item.top_p * static_cast<double>(total);
    uint64_t target = static_cast<uint64_t>(wanted) + (wanted > floor(wanted) ? 1 : 0);
    target = target > total ? total : (target < 1 ? 1 : target);
    descend(target, weight);
    // Of equal logits as many as it takes, at least one.
    const double weight_of_least = exp((static_cast<double>(float_of_key(least)) - item.top) / item.temperature);
    const auto each = static_cast<uint64_t>(weight_of_least * fixed_point);
    const uint64_t rest = target > shared.above ? target - shared.above : 1;
    const uint64_t count = each == 0 ? 1 : (rest + each - 1) / each;
    ties = static_cast<int32_t>(count < static_cast<uint64_t>(n) ? count : static_cast<uint64_t>(n));
    sync_block();
  }

  // Threads have consecutive ids each, so that ties and sums go in the order of the ids.
  GPTX_DEVICE int32_t draw(double u) {
    const int each = ceil_div(n, kSampleThreads);
    const int begin = thread_index() * each;
    const int end = begin + each < n ? begin + each : n;
    int32_t mine = 0;
    for (int i = begin; i < end; ++i) mine += key_of(logits[i]) == least;
    shared.tie_ranks[thread_index()] = block_sum_before(shared, mine);
    // Calls f(i, p) for what is kept of a thread's ids.
    const auto for_each_kept = [&](int first, int last, int rank, auto f) {
      for (int i = first; i < last; ++i) {
        const uint32_t key = key_of(logits[i]);
        if (key < least || !allowed(i) || (key == least && rank++ >= ties)) continue;
        const double p = weights[i];
        if (!(p < item.min_p) && !f(i, p)) return;
      }
    };
    double sum = 0.0;
    int32_t last = -1;
    for_each_kept(begin, end, shared.tie_ranks[thread_index()], [&](int i, double p) {
      sum += p;
      last = i;
      return true;
    });
    shared.chunk_sums[thread_index()] = sum;
    sync_block();
    if (thread_index() < kSampleWarps) {
      double group = 0.0;
      for (int i = 0; i < kWarp; ++i) group += shared.chunk_sums[thread_index() * kWarp + i];
      shared.group_sums[thread_index()] = group;
    }
    const auto fallback = static_cast<int32_t>(block_max(shared, static_cast<uint64_t>(last + 1))) - 1;
    if (thread_index() != 0) return fallback;
    double total = 0.0;
    for (int w = 0; w < kSampleWarps; ++w) total += shared.group_sums[w];
    double rest = u * total;
    int group = 0;
    while (group < kSampleWarps && rest >= shared.group_sums[group]) rest -= shared.group_sums[group++];
    int chunk = group * kWarp;
    while (chunk < kSampleThreads && rest >= shared.chunk_sums[chunk]) rest -= shared.chunk_sums[chunk++];
    int32_t token = fallback;
    if (chunk == kSampleThreads) return fallback;
    const int first = chunk * each;
    for_each_kept(first, first + each < n ? first + each : n, shared.tie_ranks[chunk], [&](int i, double p) {
      rest -= p;
      if (rest >= 0) return true;
      token = i;
      return false;
    });
    return token;
  }
};

// Of every id of the sequence once (Keskar et al., 2019).
GPTX_DEVICE void penalize(float* logits, const int32_t* ids, int begin, int end, double penalty, uint32_t* seen,
                          int vocab_size) {
  for (int i = thread_index(); i < ceil_div(vocab_size, 32); i += kSampleThreads) seen[i] = 0;
  sync_block();
  for (int i = begin + thread_index(); i < end; i += kSampleThreads) {
    const uint32_t bit = 1u << ids[i] % 32;
    if (atomic_or(&seen[ids[i] / 32], bit) & bit) continue;
    const double logit = static_cast<double>(logits[ids[i]]);
    logits[ids[i]] = static_cast<float>(logit > 0 ? logit / penalty : logit * penalty);
  }
  sync_block();
}

// Where a token goes: to the host, and to the next row of its sequence.
GPTX_DEVICE void hand_out(const SampleStep& step, SampleItem& item, int which, int items, int32_t token) {
  step.chosen[static_cast<size_t>(item.taken) * static_cast<size_t>(items) + static_cast<size_t>(which)] = token;
  ++item.taken;
  ++item.position;
  if (item.feed_row < 0) return;
  step.tokens[item.feed_row] = token < 0 ? 0 : token;
  ++step.positions[item.feed_row];
  ++step.queries[item.feed_row].position;
}

// x items.
GPTX_KERNEL void __launch_bounds__(kSampleThreads, 1) choose_largest(SampleStep step) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<SampleShared*>(shared_memory());
  SampleItem& item = step.items[block_x()];
  float* const logits = step.logits.row(item.logit_row);
  const int n = step.vocab_size;
  const int me = thread_index();

  // The product that made the logits left the largest of each of its blocks.
  uint64_t best = 0;
  for (int i = me; i < step.maxima; i += kSampleThreads) {
    const uint64_t other = step.logits.maxima[item.logit_row * step.maxima + i];
    best = other > best ? other : best;
  }
  best = block_max(shared, best);
  const bool failed = best == kNotFinite;
  const bool changes = item.repetition_penalty != 1.0 || item.banned_end > item.banned_begin;
  if (!failed && changes) {
    if (item.repetition_penalty != 1.0) {
      auto* const seen = reinterpret_cast<uint32_t*>(shared_memory() + sizeof(SampleShared));
      penalize(logits, item.ids, item.sequence_begin, item.sequence_end, item.repetition_penalty, seen, n);
    }
    for (int i = item.banned_begin + me; i < item.banned_end; i += kSampleThreads) logits[item.ids[i]] = -INFINITY;
    sync_block();
    best = 0;
    for (int i = me; i < n; i += kSampleThreads) {
      const uint64_t rank = logits[i] == -INFINITY ? 0 : rank_of(logits[i], i);
      best = rank > best ? rank : best;
    }
    best = block_max(shared, best);
  }
  if (me != 0) return;
  const bool any = best != 0;  // or everything is banned
  item.top = static_cast<double>(float_of_key(static_cast<uint32_t>(best >> 32)));
  item.undecided = !failed && any && item.temperature != 0.0;
  if (!item.undecided) hand_out(step, item, block_x(), grid_x(), failed ? kNoToken : (any ? index_of_rank(best) : 0));
}

// x parts of the vocabulary, y items.
GPTX_KERNEL void weigh(SampleStep step) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const SampleItem& item = step.items[block_y()];
  const int i = block_x() * kWeighThreads + thread_index();
  if (!item.undecided || i >= step.vocab_size) return;
  const auto logit = static_cast<double>(step.logits.row(item.logit_row)[i]);
  double* const weights = step.weights + static_cast<size_t>(block_y()) * static_cast<size_t>(step.vocab_size);
  weights[i] = exp((logit - item.top) / item.temperature);
}

// x items.
GPTX_KERNEL void __launch_bounds__(kSampleThreads, 1) sample(SampleStep step) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<SampleShared*>(shared_memory());
  SampleItem& item = step.items[block_x()];
  if (!item.undecided) return;
  const int n = step.vocab_size;
  const double* const weights = step.weights + static_cast<size_t>(block_x()) * static_cast<size_t>(n);
  Sampling sampling{shared, step.logits.row(item.logit_row), n, item, weights};
  int bits = 1;
  while (bits < 31 && n >> bits != 0) ++bits;
  sampling.fixed_point = static_cast<double>(uint64_t{1} << (62 - bits));
  sampling.keep_top_k();
  sampling.keep_top_p();
  const int32_t token = sampling.draw(philox_uniform(item.seed, item.position));
  if (thread_index() == 0) hand_out(step, item, block_x(), grid_x(), token);
}

}  // namespace gptx::cuda

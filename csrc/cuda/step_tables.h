// What the kernels of a step read of its batch. Everything that changes from token to token is here and not an argument
// of a kernel, so that a recorded step can be run again, and so that the device can go on to the next token by itself.
#pragma once

#include <cstddef>
#include <span>

#include "core/batch.h"
#include "core/sampling.h"
#include "cuda/device.h"
#include "cuda/kernels/attention.h"
#include "cuda/kernels/sample_items.h"

namespace gptx::cuda {

struct TableLimits {
  size_t rows;             // of a step
  size_t logit_rows;
  size_t context_blocks;   // KV blocks of a sequence
  size_t length;           // tokens of a step of several
};

// Queries of two kinds: few rows, for which each KV block is a block of threads, and many.
struct QueryList {
  const QueryItem* few = nullptr;
  const QueryItem* many = nullptr;
  size_t few_count = 0, many_count = 0;
  int few_rows = 1;          // the most rows of one of the few
  size_t few_blocks = 1;     // the most KV blocks of one of the few
};

class StepTables {
 public:
  // `split_queries`: whether queries of many rows are cut into ones of few.
  StepTables(Device& device, const TableLimits& limits, bool split_queries);

  // Copies a step to the device. With `feed_back` each token becomes the next row of its sequence.
  void upload(const Batch& batch, std::span<const SampleTask> samples, bool feed_back, size_t length);

  // Of the device.
  const int32_t* tokens() const { return at<int32_t>(layout_.tokens); }
  const int32_t* positions() const { return at<int32_t>(layout_.positions); }
  const int32_t* row_tables() const { return at<int32_t>(layout_.row_tables); }
  const int32_t* block_tables() const { return at<int32_t>(layout_.block_tables); }
  const int32_t* kept_rows() const { return at<int32_t>(layout_.kept_rows); }
  const QueryList& queries() const { return queries_; }
  const QueryList& kept_queries() const { return kept_queries_; }
  SampleStep sample_step(const RowsView& logits, int maxima, int vocab_size, double* weights) const;
  size_t samples() const { return samples_; }
  bool all_greedy() const { return all_greedy_; }

  // The tokens [length, samples] that were chosen, once the queue has run.
  void download_chosen(size_t length);
  std::span<const int32_t> chosen() const { return {chosen_host_, chosen_count_}; }

 private:
  struct Layout {  // in bytes
    size_t tokens, positions, row_tables, block_tables, kept_rows, queries, kept_queries, samples, end;
  };

  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  template <class T>
  T* host_at(size_t offset) const {
    return reinterpret_cast<T*>(host_ + offset);
  }
  QueryList fill_queries(size_t offset, std::span<const Query> queries, std::span<const int32_t> tables,
                         size_t length);
  void fill_samples(std::span<const SampleTask> samples, bool feed_back);

  Device& device_;
  TableLimits limits_;
  bool split_queries_;
  Layout layout_{};
  std::byte* memory_;
  std::byte* host_;
  int32_t* ids_ = nullptr;  // sequences and banned ids of the samples
  int32_t* ids_host_ = nullptr;
  size_t ids_capacity_ = 0;
  int32_t* chosen_;
  int32_t* chosen_host_;
  size_t chosen_count_ = 0;
  size_t samples_ = 0;
  bool all_greedy_ = true;
  QueryList queries_, kept_queries_;
};

}  // namespace gptx::cuda

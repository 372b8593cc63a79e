#include "cuda/step_tables.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace gptx::cuda {

StepTables::StepTables(Device& device, const TableLimits& limits, bool split_queries)
    : device_(device), limits_(limits), split_queries_(split_queries) {
  size_t end = 0;
  const auto place = [&](size_t bytes) {
    const size_t begin = end;
    end += (bytes + 127) / 128 * 128;
    return begin;
  };
  layout_.tokens = place(limits.rows * sizeof(int32_t));
  layout_.positions = place(limits.rows * sizeof(int32_t));
  layout_.row_tables = place(limits.rows * sizeof(int32_t));
  layout_.kept_rows = place(limits.rows * sizeof(int32_t));
  layout_.samples = place(limits.logit_rows * sizeof(SampleItem));
  // A query has at least one row.
  layout_.queries = place(limits.rows * sizeof(QueryItem));
  layout_.kept_queries = place(limits.rows * sizeof(QueryItem));
  layout_.block_tables = place(limits.rows * limits.context_blocks * sizeof(int32_t));
  layout_.end = end;
  memory_ = static_cast<std::byte*>(device.allocate(end, "tables of a step"));
  host_ = static_cast<std::byte*>(device.allocate_host(end));
  const size_t chosen = limits.length * limits.logit_rows * sizeof(int32_t);
  chosen_ = static_cast<int32_t*>(device.allocate(chosen, "tokens of a step"));
  chosen_host_ = static_cast<int32_t*>(device.allocate_host(chosen));
}

QueryList StepTables::fill_queries(size_t offset, std::span<const Query> queries,
                                   std::span<const int32_t> tables, size_t length) {
  const auto is_few = [&](const Query& q) { return split_queries_ || q.rows <= kRows; };
  auto* item = host_at<QueryItem>(offset);
  QueryList list;
  list.few = at<QueryItem>(offset);
  for (const Query& q : queries) {
    if (!is_few(q)) continue;
    for (size_t i = 0; i < q.rows; i += kRows, ++item, ++list.few_count) {
      const size_t rows = std::min<size_t>(kRows, q.rows - i);
      *item = {static_cast<int32_t>(q.row + i), static_cast<int32_t>(q.out_row + i), static_cast<int32_t>(rows),
               static_cast<int32_t>(q.position + i), tables[q.sequence]};
      list.few_rows = std::max(list.few_rows, static_cast<int>(rows));
      list.few_blocks = std::max(list.few_blocks, (q.position + length - 1) / kBlock + 1);
    }
  }
  // In powers of two, so that a recorded step serves for longer; what is too many has nothing to do.
  list.few_blocks = std::min(std::bit_ceil(list.few_blocks), limits_.context_blocks);
  list.many = list.few + list.few_count;
  for (const Query& q : queries) {
    if (is_few(q)) continue;
    *item++ = {static_cast<int32_t>(q.row), static_cast<int32_t>(q.out_row), static_cast<int32_t>(q.rows),
               static_cast<int32_t>(q.position), tables[q.sequence]};
    ++list.many_count;
  }
  return list;
}

void StepTables::fill_samples(std::span<const SampleTask> samples, bool feed_back) {
  auto* const items = host_at<SampleItem>(layout_.samples);
  const auto sequence_of = [](const SampleTask& task) {
    return task.params->repetition_penalty != 1.0 ? task.sequence : std::span<const int32_t>();
  };
  size_t wanted = 0;
  for (const SampleTask& task : samples) wanted += sequence_of(task).size() + task.banned.size();
  if (wanted > ids_capacity_) {
    ids_capacity_ = 2 * wanted;
    ids_ = static_cast<int32_t*>(device_.allocate(ids_capacity_ * sizeof(int32_t), "ids of a step"));
    ids_host_ = static_cast<int32_t*>(device_.allocate_host(ids_capacity_ * sizeof(int32_t)));
  }
  size_t ids = 0;
  const auto add_ids = [&](std::span<const int32_t> more) {
    std::copy(more.begin(), more.end(), ids_host_ + ids);
    ids += more.size();
    return static_cast<int32_t>(ids);
  };
  for (size_t i = 0; i < samples.size(); ++i) {
    const SampleTask& task = samples[i];
    const SamplingParams& p = *task.params;
    SampleItem& item = items[i];
    item = {.position = task.position,
            .seed = p.seed,
            .repetition_penalty = p.repetition_penalty,
            .temperature = p.temperature,
            .top_p = p.top_p,
            .min_p = p.min_p,
            .top_k = p.top_k,
            .logit_row = static_cast<int32_t>(task.logit_row),
            .feed_row = feed_back ? static_cast<int32_t>(i) : -1,
            .taken = 0,
            .sequence_begin = static_cast<int32_t>(ids),
            .sequence_end = 0,
            .banned_begin = 0,
            .banned_end = 0,
            .ids = ids_,
            .top = 0.0,
            .undecided = 0};
    item.sequence_end = add_ids(sequence_of(task));
    item.banned_begin = item.sequence_end;
    item.banned_end = add_ids(task.banned);
  }
  samples_ = samples.size();
  all_greedy_ = std::all_of(samples.begin(), samples.end(),
                            [](const SampleTask& task) { return task.params->temperature == 0.0; });
  if (ids > 0) device_.upload(ids_, ids_host_, ids * sizeof(int32_t));
}

void StepTables::upload(const Batch& batch, std::span<const SampleTask> samples, bool feed_back, size_t length) {
  std::copy(batch.tokens.begin(), batch.tokens.end(), host_at<int32_t>(layout_.tokens));
  std::copy(batch.positions.begin(), batch.positions.end(), host_at<int32_t>(layout_.positions));
  std::copy(batch.kept_rows.begin(), batch.kept_rows.end(), host_at<int32_t>(layout_.kept_rows));

  // A sequence brings the blocks that this step can reach.
  std::vector<int32_t> tables(batch.blocks.size());
  std::vector<size_t> reach(batch.blocks.size());
  for (const Query& q : batch.queries) {
    reach[q.sequence] = std::max(reach[q.sequence], q.position + q.rows + length - 1);
  }
  size_t blocks = 0;
  for (size_t s = 0; s < batch.blocks.size(); ++s) {
    tables[s] = static_cast<int32_t>(blocks);
    const size_t n = std::min(batch.blocks[s].size(), (reach[s] + kBlock - 1) / kBlock);
    std::copy_n(batch.blocks[s].begin(), n, host_at<int32_t>(layout_.block_tables) + blocks);
    blocks += n;
  }
  for (const Query& q : batch.queries) {
    std::fill_n(host_at<int32_t>(layout_.row_tables) + q.row, q.rows, tables[q.sequence]);
  }
  queries_ = fill_queries(layout_.queries, batch.queries, tables, length);
  kept_queries_ = fill_queries(layout_.kept_queries, batch.kept_queries, tables, length);
  fill_samples(samples, feed_back);
  device_.upload(memory_, host_, layout_.block_tables + blocks * sizeof(int32_t));
}

SampleStep StepTables::sample_step(const RowsView& logits, int maxima, int vocab_size, double* weights) const {
  return {.logits = logits,
          .maxima = maxima,
          .vocab_size = vocab_size,
          .weights = weights,
          .items = at<SampleItem>(layout_.samples),
          .chosen = chosen_,
          .tokens = at<int32_t>(layout_.tokens),
          .positions = at<int32_t>(layout_.positions),
          .queries = at<QueryItem>(layout_.queries)};
}

void StepTables::download_chosen(size_t length) {
  chosen_count_ = length * samples_;
  if (chosen_count_ > 0) device_.download(chosen_host_, chosen_, chosen_count_ * sizeof(int32_t));
}

}  // namespace gptx::cuda

// What one step computes: T tokens of several sequences, prefill chunks and decode rows mixed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace gptx {

// Positions of a block of the KV cache, on every backend.
inline constexpr size_t kBlockTokens = 64;

// Consecutive positions of one sequence inside one KV block: the unit of attention.
struct Query {
  size_t row;       // of the first position in the step's activations
  size_t out_row;   // of its result
  size_t rows;
  size_t position;
  size_t sequence;  // index into Batch::blocks
};

struct Batch {
  std::vector<int32_t> tokens;                    // [T]
  std::vector<size_t> positions;                  // [T]
  std::vector<std::span<const int32_t>> blocks;   // per sequence, the ids of its KV blocks
  std::vector<size_t> lengths;                    // per sequence, its rows
  std::vector<size_t> kept_counts;                // per sequence, how many of its last rows leave the last layer
  std::vector<size_t> kept_rows;                  // those rows, ascending
  size_t n_logits = 0;                            // the first kept rows want logits, the others their hidden state alone
  std::vector<Query> queries;                     // cover all rows
  std::vector<Query> kept_queries;                // cover kept_rows, out_row counts them
  bool keeps_states = false;                      // whether somebody reads the states between the layers

  size_t size() const { return tokens.size(); }

  // Appends a chunk of one sequence that starts at `position` and keeps its last `n_kept` rows.
  // Requires: none that wants logits comes behind one that keeps rows without.
  void add(std::span<const int32_t> chunk, size_t position, std::span<const int32_t> block_ids, size_t n_kept,
           bool wants_logits = true) {
    const size_t first = tokens.size();
    const size_t first_kept = chunk.size() - n_kept;
    for (size_t i = 0; i < chunk.size(); ++i) {
      tokens.push_back(chunk[i]);
      positions.push_back(position + i);
    }
    add_queries(queries, first, first, chunk.size(), position, blocks.size());
    add_queries(kept_queries, first + first_kept, kept_rows.size(), n_kept, position + first_kept, blocks.size());
    for (size_t i = first_kept; i < chunk.size(); ++i) kept_rows.push_back(first + i);
    if (wants_logits) n_logits = kept_rows.size();
    blocks.push_back(block_ids);
    lengths.push_back(chunk.size());
    kept_counts.push_back(n_kept);
  }

 private:
  static void add_queries(std::vector<Query>& out, size_t row, size_t out_row, size_t rows,
                          size_t position, size_t sequence) {
    while (rows > 0) {
      const size_t room = kBlockTokens - position % kBlockTokens;
      const size_t n = rows < room ? rows : room;
      out.push_back({row, out_row, n, position, sequence});
      row += n;
      out_row += n;
      position += n;
      rows -= n;
    }
  }
};

}  // namespace gptx

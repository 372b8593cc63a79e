// GPT-2 (Radford et al., 2019). THE MODEL: what is computed, in the order of the paper; how, where
// and by how many threads is the backend's.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/config.h"
#include "model/backend.h"

namespace gptx {

template <class B>
struct BlockWeights {
  typename B::Norm ln_1;
  typename B::Linear attn_c_attn;  // [H, (q, k, v), D] <- [C]
  typename B::Linear attn_c_proj;  // [C] <- [C]
  typename B::Norm ln_2;
  typename B::Linear mlp_c_fc;     // [F] <- [C], with the activation
  typename B::Linear mlp_c_proj;   // [C] <- [F]
};

template <class B>
struct GptWeights {
  const typename B::TokenTable* wte = nullptr;  // [V, C]
  typename B::PositionTable wpe;                // [block_size, C]
  std::vector<BlockWeights<B>> blocks;
  typename B::Norm ln_f;
  typename B::Linear lm_head;                   // [V] <- [C]
};

template <class B>
struct Activations {
  typename B::Rows x;       // [T, C], the residual stream
  typename B::Rows qkv;     // [T, H, 3, D]
  typename B::Rows y;       // [T, C], what attention gathered
  typename B::Rows mlp;     // [T, F]
  typename B::Rows logits;  // [rows that want them, V]
};

template <Backend B>
class Gpt {
 public:
  Gpt(const GptConfig& config, GptWeights<B> weights, Activations<B> activations)
      : config_(config), weights_(std::move(weights)), a_(std::move(activations)) {}

  // Fills `logits` for the rows of the batch that want them, and the KV cache for all.
  void forward(B& b, const Batch& batch) {
    b.embed(a_.x, *weights_.wte, weights_.wpe, batch);
    for (size_t layer = 0; layer < config_.n_layer; ++layer) {
      b.keep_states(a_.x, layer, batch);
      block(b, layer, batch);
    }
    b.keep_states(a_.x, config_.n_layer, batch);
    if (batch.keeps_states) b.keep_rows(a_.x, batch);  // no layer was pruned
    b.norm_linear(a_.logits, a_.x, weights_.ln_f, weights_.lm_head, batch.n_logits);
  }

  typename B::Rows& logits() { return a_.logits; }

  const Activations<B>& activations() const { return a_; }

  // The residual stream of the rows that the batch keeps, before the final norm.
  const typename B::Rows& hidden() const { return a_.x; }
  const typename B::Norm& final_norm() const { return weights_.ln_f; }

 private:
  void block(B& b, size_t layer, const Batch& batch) {
    const BlockWeights<B>& w = weights_.blocks[layer];
    // Beyond the last K and V only the rows that somebody reads matter.
    const bool prune = layer + 1 == config_.n_layer && batch.kept_rows.size() < batch.size() && !batch.keeps_states;
    const std::vector<Query>& queries = prune ? batch.kept_queries : batch.queries;
    const size_t rows = prune ? batch.kept_rows.size() : batch.size();

    b.self_attention(a_.y, a_.qkv, a_.x, w.ln_1, w.attn_c_attn, layer, attention_scale(layer), batch,
                     queries);
    if (prune) b.keep_rows(a_.x, batch);
    b.add_linear(a_.x, a_.y, w.attn_c_proj, rows);
    b.norm_linear(a_.mlp, a_.x, w.ln_2, w.mlp_c_fc, rows);
    b.add_linear(a_.x, a_.mlp, w.mlp_c_proj, rows);
  }

  float attention_scale(size_t layer) const {
    double scale = 1.0;
    if (config_.scale_attn_weights) scale /= std::sqrt(static_cast<double>(config_.head_size()));
    if (config_.scale_attn_by_inverse_layer_idx) scale /= static_cast<double>(layer + 1);
    return static_cast<float>(scale);
  }

  GptConfig config_;
  GptWeights<B> weights_;
  Activations<B> a_;
};

}  // namespace gptx

// The shape of a GPT-2. Python validates it (gptx/config.py); the core trusts it.
#pragma once

#include <cstddef>
#include <string>

namespace gptx {

struct GptConfig {
  size_t vocab_size = 0;  // V
  size_t block_size = 0;  // context length in tokens
  size_t n_layer = 0;     // L
  size_t n_head = 0;      // H
  size_t n_embd = 0;      // C
  size_t n_inner = 0;     // F
  std::string activation = "gelu_new";
  float layer_norm_epsilon = 1e-5f;
  bool scale_attn_weights = true;
  bool scale_attn_by_inverse_layer_idx = false;
  bool tie_word_embeddings = true;

  size_t head_size() const { return n_embd / n_head; }  // D
};

}  // namespace gptx

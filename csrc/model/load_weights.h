// Which tensors of a model file are which weights of the model, for every backend. A Loader brings them to its device:
//   norm(base)                      the vectors "<base>.weight" and "<base>.bias" [C]
//   linear(base, n, k, activation)  the matrix "<base>.weight" [n, k] and "<base>.bias" [n]
//   matrix(base, n, k)              the matrix alone, which stays where it is
//   positions()                     wpe
//   without_bias(matrix)            a linear map of it
#pragma once

#include <string>

#include "core/error.h"
#include "model/gpt.h"

namespace gptx {

template <class Activation>
Activation activation_named(const std::string& name) {
  if (name == "gelu_new") return Activation::kGeluNew;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  throw ParameterError("activation", "'" + name + "'", "one of gelu_new, gelu, relu");
}

// Columns of c_attn: q, k and v of each head, padded to a panel of 16.
inline size_t qkv_width(const GptConfig& config) {
  return 3 * config.n_head * ((config.head_size() + 15) / 16 * 16);
}

template <class B, class Activation, class Loader>
GptWeights<B> load_weights(const GptConfig& config, Loader load) {
  const size_t c = config.n_embd;
  const auto activation = activation_named<Activation>(config.activation);
  GptWeights<B> w;
  w.wpe = load.positions();
  for (size_t i = 0; i < config.n_layer; ++i) {
    const std::string h = "h." + std::to_string(i) + ".";
    w.blocks.push_back(
        {.ln_1 = load.norm(h + "ln_1"),
         .attn_c_attn = load.linear(h + "attn.c_attn", qkv_width(config), c, Activation::kNone),
         .attn_c_proj = load.linear(h + "attn.c_proj", c, c, Activation::kNone),
         .ln_2 = load.norm(h + "ln_2"),
         .mlp_c_fc = load.linear(h + "mlp.c_fc", config.n_inner, c, activation),
         .mlp_c_proj = load.linear(h + "mlp.c_proj", c, config.n_inner, Activation::kNone)});
  }
  w.ln_f = load.norm("ln_f");
  w.wte = &load.matrix("wte", config.vocab_size, c);
  w.lm_head = load.without_bias(
      config.tie_word_embeddings ? *w.wte : load.matrix("lm_head", config.vocab_size, c));
  return w;
}

}  // namespace gptx

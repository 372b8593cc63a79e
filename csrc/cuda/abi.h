/* The library libgptx_cuda as the core sees it: plain C, so that the two can be built by different compilers, and so that
   other programs can drive it. One function is exported; everything else is reached through what it returns. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GPTX_CUDA_ABI 5

typedef enum {
  GPTX_CUDA_OK = 0,
  GPTX_CUDA_PARAMETER = 1,      /* error.param, value, message (what is allowed) */
  GPTX_CUDA_DEVICE = 2,         /* error.message */
  GPTX_CUDA_OUT_OF_MEMORY = 3,  /* error.message (for what), need, have */
  GPTX_CUDA_INTERNAL = 4        /* error.message */
} gptx_cuda_status;

typedef struct {
  char message[1024];
  char param[64];
  char value[128];
  uint64_t need, have;
} gptx_cuda_error;

/* Why the devices can or cannot be used. */
typedef enum {
  GPTX_CUDA_USABLE = 0,
  GPTX_CUDA_NO_DRIVER = 1,
  GPTX_CUDA_DRIVER_TOO_OLD = 2,
  GPTX_CUDA_DRIVER_BROKEN = 3,
  GPTX_CUDA_NO_DEVICE = 4,
  GPTX_CUDA_OTHER = 5
} gptx_cuda_state;

typedef struct {
  gptx_cuda_state state;
  int32_t driver_version;  /* 13000 for CUDA 13.0; 0 without a driver */
  int32_t runtime_version; /* what the library was built with */
  int32_t devices;
  char message[1024];
} gptx_cuda_probe;

typedef struct {
  char name[256];
  int32_t capability; /* 90 for 9.0 */
  int32_t multiprocessors;
  int32_t usable;     /* whether the library has code for it */
  uint64_t total_bytes, free_bytes;
} gptx_cuda_device;

typedef struct {
  const char* name;
  const void* data;
  uint64_t bytes;
} gptx_cuda_tensor;

typedef struct {
  /* Shape of the model, as in core/config.h. */
  uint64_t vocab_size, block_size, n_layer, n_head, n_embd, n_inner;
  const char* activation;
  float layer_norm_epsilon;
  int32_t scale_attn_weights, scale_attn_by_inverse_layer_idx, tie_word_embeddings;
  /* Weights as in docs/model-file.md; they are copied. */
  int32_t dtype;      /* 0 float32, 1 bfloat16, 2 int8 */
  const gptx_cuda_tensor* tensors;
  uint64_t n_tensors;
  /* How to compute. */
  int32_t precision;  /* 0 float32, 1 bfloat16, 2 int8, 3 int8-fast */
  int32_t kv_type;    /* 0 float32, 1 bfloat16, 2 int8 */
  int32_t device;
  uint64_t kv_blocks, rows, logit_rows;
  uint64_t steps_ahead; /* the most tokens of a step of several */
} gptx_cuda_model_options;

/* Consecutive positions of one sequence, of which the last `n_kept` want logits, or else their hidden state alone; parts
   that do not want logits come last. */
typedef struct {
  const int32_t* tokens;
  uint64_t n_tokens, position;
  const int32_t* blocks; /* the ids of its KV blocks */
  uint64_t n_blocks, n_kept;
  int32_t wants_logits;
} gptx_cuda_part;

/* A token to choose from row `logit_row` of those that want logits; at most one for each. */
typedef struct {
  uint64_t logit_row, position, seed;
  double repetition_penalty, temperature, top_p, min_p;
  int64_t top_k;
  const int32_t* sequence;
  uint64_t n_sequence;
  const int32_t* banned;
  uint64_t n_banned;
} gptx_cuda_sample;

typedef struct {
  const gptx_cuda_part* parts;
  uint64_t n_parts;
  const gptx_cuda_sample* samples;
  uint64_t n_samples;
  uint64_t length; /* more than 1: every part has one token and one sample, and tokens are fed back */
  int32_t keeps_states; /* whether `state` will be asked for */
} gptx_cuda_step;

typedef struct gptx_cuda_model gptx_cuda_model;

/* Any thread may call functions of a model: each waits for the one before. Where one fails, `error` says why. */
typedef struct {
  uint32_t abi, size; /* GPTX_CUDA_ABI, sizeof this */
  const char* version;
  const char* architectures; /* "80 90 120" */
  /* Whether the devices can be used. */
  void (*probe)(gptx_cuda_probe* out);
  /* What device `index` is. */
  gptx_cuda_status (*device)(int32_t index, gptx_cuda_device* out, gptx_cuda_error* error);
  /* Bytes of one KV block of a model with these options. */
  uint64_t (*kv_block_bytes)(const gptx_cuda_model_options* options);
  /* Copies a model to its device. */
  gptx_cuda_status (*open)(const gptx_cuda_model_options* options, gptx_cuda_model** out, gptx_cuda_error* error);
  void (*close)(gptx_cuda_model* model);
  /* The instructions that multiply many rows: "mma" or "wgmma". */
  const char* (*multiplier)(const gptx_cuda_model* model);
  /* Runs a step and chooses tokens [length, n_samples]; -1 where a logit is not finite. */
  gptx_cuda_status (*run)(gptx_cuda_model* model, const gptx_cuda_step* step, int32_t* tokens,
                          gptx_cuda_error* error);
  /* Logits [n, V] of at most logit_rows rows of those that wanted them in the last step, in memory of the host that is
     the caller's to change until the next call; where a token was chosen from them, they may be changed already. */
  gptx_cuda_status (*logits)(gptx_cuda_model* model, const uint64_t* rows, uint64_t n, float** out,
                             gptx_cuda_error* error);
  /* The hidden state [C] of row `row` of those that were kept: the residual stream after the final norm. */
  gptx_cuda_status (*hidden)(gptx_cuda_model* model, uint64_t row, float* out, gptx_cuda_error* error);
  /* Of row `row` of a step that kept states: the state [C] before layer `layer`, behind the final norm for n_layer. */
  gptx_cuda_status (*state)(gptx_cuda_model* model, uint64_t layer, uint64_t row, float* out, gptx_cuda_error* error);
  /* The KV cache, block by block, in order with the steps. The first two return at once. */
  gptx_cuda_status (*copy_block)(gptx_cuda_model* model, int32_t from, int32_t to, gptx_cuda_error* error);
  /* Makes all bytes 0xFF, which is NaN in every float. */
  gptx_cuda_status (*poison_block)(gptx_cuda_model* model, int32_t block, gptx_cuda_error* error);
  /* Copies the kv_block_bytes of a block to the host, and from there. */
  gptx_cuda_status (*read_block)(gptx_cuda_model* model, int32_t block, void* out, gptx_cuda_error* error);
  gptx_cuda_status (*write_block)(gptx_cuda_model* model, int32_t block, const void* in, gptx_cuda_error* error);
} gptx_cuda_api;

/* Null where the library does not speak this version. */
const gptx_cuda_api* gptx_cuda_get_api(uint32_t abi);
typedef const gptx_cuda_api* (*gptx_cuda_get_api_function)(uint32_t abi);

#ifdef __cplusplus
}
#endif

// What a step of few rows is made of, measured alone: how long a GPU takes from one kernel to the next, how fast the
// matrices of a layer come from memory when each is a kernel, and both for one kernel that stays and waits at barriers
// instead, with one phase read ahead. A step in one kernel pays only where that is clearly faster. Prints lines of JSON.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "cuda/kernels/vocabulary.h"

namespace {

using namespace gptx::cuda;

constexpr int kLoads = 16;           // of 16 bytes, on their way at once in each thread
constexpr int kBlockWarps = 3;       // three chains of 256 inputs in bfloat16: a panel of 768
constexpr int kStayingWarps = 16;    // that read; one more waits at the barriers
constexpr int kPhases = 128;         // kernels of a graph, or phases of the kernel that stays
constexpr int kRepeats = 20;
constexpr size_t kBuffer = size_t{2} << 30;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

__device__ uint32_t mix(uint32_t sum, const uint4& v) { return sum ^ v.x ^ v.y ^ v.z ^ v.w; }

// Asks for 16 bytes `Loads` times, `once`: out of a loop ptxas does not move loads to where their values are used.
template <int Loads>
__device__ void ask(uint4 (&v)[Loads], const uint4* p, size_t stride, int once) {
#pragma unroll 1
  for (int round = 0; round < once; ++round) {
#pragma unroll
    for (int i = 0; i < Loads; ++i) v[i] = load_streamed(p + (round + i) * stride);
  }
}
template <int Loads>
__device__ uint32_t mix_all(uint32_t sum, const uint4 (&v)[Loads]) {
#pragma unroll
  for (int i = 0; i < Loads; ++i) sum = mix(sum, v[i]);
  return sum;
}

__global__ void nothing() {
  let_next_kernel_start();
  wait_for_previous_kernel();
}

// A part of a matrix for each block, asked for before it waits for the kernel in front.
__global__ void read_matrix(const uint4* from, int once, uint32_t* out) {
  let_next_kernel_start();
  uint4 v[kLoads] = {};
  const size_t threads = blockDim.x;
  ask(v, from + blockIdx.x * threads * kLoads + threadIdx.x, threads, once);
  wait_for_previous_kernel();
  const uint32_t sum = mix_all(0, v);
  if (sum == 0x9e3779b9u) *out = sum;
}

__global__ void read_all(const uint4* from, size_t n, uint32_t* out) {
  uint32_t sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 v[8];
    ask(v, from + i, stride, 1);
    sum = mix_all(sum, v);
  }
  for (; i < n; i += stride) sum = mix(sum, load_streamed(from + i));
  if (sum == 0x9e3779b9u) *out = sum;
}

// Every block arrives and waits for all; the counter only grows. A warp that reads nothing does so.
__device__ void pass_barrier(uint32_t* counter, uint32_t target) {
  sync_block();
  if (thread_index() == kStayingWarps * kWarp) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (arrived < target);
  }
  sync_block();
}

// Phases with a barrier behind each; the loads of a phase are on their way before the barrier in front of it.
template <int Loads>
__global__ void __launch_bounds__((kStayingWarps + 1) * kWarp, 1)
    stay(const uint4* from, int once, uint32_t* counter, uint32_t* out) {
  const size_t stride = size_t{gridDim.x} * kStayingWarps * kWarp;
  const uint4* p = from + size_t{blockIdx.x} * kStayingWarps * kWarp + threadIdx.x;
  uint32_t sum = 0;
  uint4 v[Loads == 0 ? 1 : Loads] = {};
  const auto next = [&] {
    if constexpr (Loads > 0) ask(v, p, stride, warp_index() < kStayingWarps ? once : 0);
    p += Loads * stride;
  };
  next();
  for (unsigned phase = 1; phase <= kPhases; ++phase) {
    sum = mix_all(sum, v);
    next();
    pass_barrier(counter, gridDim.x * phase);
  }
  if (sum == 0x9e3779b9u) *out = sum;
}

struct Bench {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  int multiprocessors = 0;
  uint4* buffer = nullptr;
  uint32_t* counter = nullptr;  // a barrier, and behind it what nobody reads

  Bench() {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    check(cudaMalloc(&buffer, kBuffer));
    check(cudaMemset(buffer, 1, kBuffer));
    check(cudaMalloc(&counter, 512));
  }

  void read_buffer() {
    read_all<<<static_cast<unsigned>(4 * multiprocessors), 512, 0, stream>>>(buffer, kBuffer / 16, counter + 64);
    check(cudaGetLastError());
  }

  // Median seconds of some work in the queue. The buffer is read before, so that the caches hold other parts of it, and so
  // that the work is in the queue by the time that it begins.
  double time(const std::function<void()>& work) {
    std::vector<double> seconds;
    for (int repeat = 0; repeat < kRepeats + 3; ++repeat) {
      check(cudaMemsetAsync(counter, 0, 512, stream));
      read_buffer();
      check(cudaEventRecord(begin, stream));
      work();
      check(cudaEventRecord(end, stream));
      check(cudaStreamSynchronize(stream));
      float ms = 0.0f;
      check(cudaEventElapsedTime(&ms, begin, end));
      if (repeat >= 3) seconds.push_back(ms / 1e3);
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }

  // Seconds of each of `kPhases` launches in one graph.
  template <class Launch>
  double time_graph(Launch launch, bool overlap) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.stream = stream;
    config.attrs = &attribute;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kPhases; ++i) {
      config.numAttrs = overlap && i > 0 ? 1 : 0;
      launch(config, static_cast<size_t>(i));
    }
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    const double seconds = time([&] { check(cudaGraphLaunch(executable, stream)); });
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
    return seconds / kPhases;
  }

  static void print(const char* what, double seconds, size_t bytes) {
    std::printf("{\"what\": \"%s\", \"microseconds\": %.3f, \"bytes\": %zu}\n", what, seconds * 1e6, bytes);
    std::fflush(stdout);
  }

  // With as many bytes for a kernel as for a phase of the one that stays, to whole blocks.
  template <int Loads>
  void phases() {
    const size_t bytes = size_t{Loads} * 16 * kStayingWarps * kWarp * static_cast<size_t>(multiprocessors);
    const size_t block = size_t{kBlockWarps} * kWarp * kLoads * 16;
    const size_t blocks = (bytes + block / 2) / block;
    if ((kPhases + 1) * std::max(bytes, blocks * block) > kBuffer) return;
    for (const bool overlap : {false, true}) {
      const double seconds = time_graph(
          [&](cudaLaunchConfig_t& config, size_t i) {
            config.blockDim = dim3(kBlockWarps * kWarp);
            config.gridDim = dim3(static_cast<unsigned>(Loads == 0 ? static_cast<size_t>(multiprocessors) : blocks));
            if (Loads == 0) {
              check(cudaLaunchKernelEx(&config, nothing));
            } else {
              const uint4* const from = buffer + i * (blocks * block / 16);
              check(cudaLaunchKernelEx(&config, read_matrix, from, 1, counter + 64));
            }
          },
          overlap);
      print(overlap ? "kernel, overlapping" : "kernel", seconds, blocks * block);
    }
    const uint4* from = buffer;
    int once = 1;
    uint32_t* out = counter + 64;
    void* arguments[] = {&from, &once, &counter, &out};
    const double seconds = time([&] {
      check(cudaLaunchCooperativeKernel(stay<Loads>, dim3(static_cast<unsigned>(multiprocessors)),
                                        dim3((kStayingWarps + 1) * kWarp), arguments, 0, stream));
    });
    print("phase of one kernel", seconds / kPhases, bytes);
  }
};

}  // namespace

int main() {
  Bench bench;
  Bench::print("reading", bench.time([&] { bench.read_buffer(); }), kBuffer);
  bench.phases<0>();
  bench.phases<1>();
  bench.phases<2>();
  bench.phases<4>();
  bench.phases<8>();
  return 0;
}

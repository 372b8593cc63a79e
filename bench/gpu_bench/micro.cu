// What a step of few rows is made of, measured alone: how long a GPU takes from one kernel to the next, how fast the
// matrices of a layer come from memory when each is a kernel, and both for one kernel that stays and waits at barriers
// instead. A persistent decode step pays only where the second is clearly faster. Prints lines of JSON.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

constexpr int kLoads = 16;             // of 16 bytes, on their way at once in each thread
constexpr int kBlockThreads = 96;      // three chains of 256 inputs in bfloat16: a panel of 768
constexpr int kStayingThreads = 512;
constexpr int kPhases = 128;           // kernels of a graph, or phases of the kernel that stays
constexpr int kRepeats = 20;
constexpr size_t kBuffer = size_t{2} << 30;  // far beyond the caches

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

__device__ uint4 load_streamed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ uint32_t mix(uint32_t sum, const uint4& v) { return sum ^ v.x ^ v.y ^ v.z ^ v.w; }

__device__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__global__ void nothing() {
  let_next_kernel_start();
  wait_for_previous_kernel();
}

// Reads 16 times 16 bytes a thread, before it waits for the kernel in front.
__global__ void read_matrix(const uint4* from, uint32_t* out) {
  let_next_kernel_start();
  const uint4* const p = from + size_t{blockIdx.x} * kBlockThreads * kLoads + threadIdx.x;
  uint4 v[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) v[i] = load_streamed(p + i * kBlockThreads);
  wait_for_previous_kernel();
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) sum = mix(sum, v[i]);
  if (sum == 0x9e3779b9u) *out = sum;
}

// Everything once.
__global__ void read_all(const uint4* from, size_t n, uint32_t* out) {
  uint32_t sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = load_streamed(from + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = mix(sum, v[k]);
  }
  if (sum == 0x9e3779b9u) *out = sum;
}

// Every block arrives and waits for all; the counter only grows.
__device__ void pass_barrier(uint32_t* counter, uint32_t target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (arrived < target);
  }
  __syncthreads();
}

// Phases with a barrier behind each; the loads of a phase are on their way before the barrier in front of it.
template <int Loads>
__global__ void __launch_bounds__(kStayingThreads, 1) stay(const uint4* from, size_t n, uint32_t* counter, uint32_t* out) {
  const size_t stride = size_t{gridDim.x} * kStayingThreads;
  const size_t mine = size_t{blockIdx.x} * kStayingThreads + threadIdx.x;
  uint32_t sum = 0;
  uint4 v[Loads == 0 ? 1 : Loads];
  const auto ask = [&](int phase) {
    const size_t begin = size_t{static_cast<unsigned>(phase)} * Loads * stride % (n - Loads * stride);
#pragma unroll
    for (int k = 0; k < Loads; ++k) v[k] = load_streamed(from + begin + k * stride + mine);
  };
  ask(0);
  for (int phase = 0; phase < kPhases; ++phase) {
#pragma unroll
    for (int k = 0; k < Loads; ++k) sum = mix(sum, v[k]);
    ask(phase + 1);
    pass_barrier(counter, gridDim.x * static_cast<unsigned>(phase + 1));
  }
  if (sum == 0x9e3779b9u) *out = sum;
}

struct Bench {
  cudaStream_t stream;
  int multiprocessors = 0;
  uint4* buffer = nullptr;
  uint32_t* counter = nullptr;  // a barrier, and behind it what nobody reads

  Bench() {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    check(cudaMalloc(&buffer, kBuffer));
    check(cudaMemset(buffer, 1, kBuffer));
    check(cudaMalloc(&counter, 512));
  }

  // Median seconds of some work in the queue.
  double time(const std::function<void()>& work) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<double> seconds;
    for (int repeat = 0; repeat < kRepeats + 3; ++repeat) {
      check(cudaMemsetAsync(counter, 0, 512, stream));
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
      launch(config, i);
    }
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    const double seconds = time([&] { check(cudaGraphLaunch(executable, stream)); });
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
    return seconds / kPhases;
  }

  static void print(const char* what, double seconds, double bytes) {
    std::printf("{\"what\": \"%s\", \"microseconds\": %.3f, \"bytes\": %.0f}\n", what, seconds * 1e6, bytes);
  }

  template <int Loads>
  void phases() {
    // As many bytes as the kernel that stays reads in a phase, to whole blocks.
    const size_t bytes = size_t{Loads} * 16 * kStayingThreads * static_cast<size_t>(multiprocessors);
    const size_t block = size_t{kBlockThreads} * kLoads * 16;
    const auto blocks = static_cast<unsigned>(std::max<size_t>(1, (bytes + block / 2) / block));
    const size_t places = kBuffer / (blocks * block);
    for (const bool overlap : {false, true}) {
      const double seconds = time_graph(
          [&](cudaLaunchConfig_t& config, int i) {
            config.gridDim = dim3(Loads == 0 ? static_cast<unsigned>(multiprocessors) : blocks);
            config.blockDim = dim3(kBlockThreads);
            if (Loads == 0) {
              check(cudaLaunchKernelEx(&config, nothing));
            } else {
              const uint4* const from = buffer + static_cast<size_t>(i) % places * (blocks * block / 16);
              check(cudaLaunchKernelEx(&config, read_matrix, from, counter + 64));
            }
          },
          overlap);
      print(overlap ? "kernel, overlapping" : "kernel", seconds, static_cast<double>(Loads == 0 ? 0 : blocks * block));
    }
    size_t n = kBuffer / 16;
    const uint4* from = buffer;
    uint32_t* out = counter + 64;
    void* arguments[] = {&from, &n, &counter, &out};
    const double seconds = time([&] {
      check(cudaLaunchCooperativeKernel(stay<Loads>, dim3(static_cast<unsigned>(multiprocessors)), dim3(kStayingThreads),
                                        arguments, 0, stream));
    });
    print("phase of one kernel", seconds / kPhases, static_cast<double>(bytes));
  }
};

}  // namespace

int main() {
  Bench bench;
  const double seconds = bench.time([&] {
    read_all<<<static_cast<unsigned>(4 * bench.multiprocessors), 512, 0, bench.stream>>>(bench.buffer, kBuffer / 16,
                                                                                        bench.counter + 64);
    check(cudaGetLastError());
  });
  Bench::print("reading", seconds, static_cast<double>(kBuffer));
  bench.phases<0>();
  bench.phases<1>();
  bench.phases<2>();
  bench.phases<4>();
  bench.phases<8>();
  return 0;
}

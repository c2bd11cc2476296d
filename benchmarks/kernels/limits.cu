// Measures the units of a multiprocessor that the Hamming kernels use, on compute capability 9.0.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a benchmarks/kernels/limits.cu -o build/limits
//
// First it checks the operand layouts of the 1-bit wgmma, bit for bit. Then it measures cycles per instruction of
//   wgmma.m64nNk256.and.popc   N = 8 to 256, A from shared memory (SS) or registers (RS), 1 to 3 warpgroups;
//   mma.sync                   1-bit with and/xor, 256 or 128 bits; 8-bit integers;
//   plain instructions         POPC, LOP3, IMAD, VIMNMX3, VIMNMX3.S16x2, VIMNMX.S16x2.
// Cycles come from the multiprocessor's counter, so they do not depend on its clock. Seconds come from events. The
// ratio of the two is printed as the clock. The exit status is 1 if a layout is wrong.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                       \
  do {                                                                                    \
    cudaError_t status = (call);                                                          \
    if (status != cudaSuccess) {                                                          \
      std::fprintf(stderr, "%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (0)

// --- wgmma, 1 bit ---

// "%0,...": the accumulator list inside the instruction, and the constraints that bind it.
#define D4 "%0,%1,%2,%3"
#define D8 D4 ",%4,%5,%6,%7"
#define D16 D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D64                                                              \
  D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
      ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define D128                                                               \
  D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"   \
      ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"   \
      ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109" \
      ",%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122"  \
      ",%123,%124,%125,%126,%127"
#define C4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define C8(i) C4(i), C4(i + 4)
#define C16(i) C8(i), C8(i + 8)
#define C32(i) C16(i), C16(i + 16)
#define C64(i) C32(i), C32(i + 32)
#define C128(i) C64(i), C64(i + 64)

template <int N>
struct Wgmma;

// REGS = N / 2 accumulators a thread; o0..o5 are the operand numbers that follow them.
#define DEFINE_WGMMA(N, REGS, o0, o1, o2, o3, o4, o5)                                                              \
  template <>                                                                                                      \
  struct Wgmma<N> {                                                                                                \
    static __device__ __forceinline__ void ss(int* d, uint64_t a, uint64_t b, int accumulate) {                    \
      asm volatile("{.reg .pred p;\n setp.ne.b32 p, %" #o2                                                         \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" D##REGS "}, %" #o0 ", %" #o1 \
                                                                                              ", p;}\n"            \
                   : C##REGS(0)                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate));                                                             \
    }                                                                                                              \
    static __device__ __forceinline__ void rs(int* d, const uint32_t* a, uint64_t b, int accumulate) {             \
      asm volatile("{.reg .pred p;\n setp.ne.b32 p, %" #o5                                                         \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" D##REGS                      \
                   "}, {%" #o0 ",%" #o1 ",%" #o2 ",%" #o3 "}, %" #o4 ", p;}\n"                                     \
                   : C##REGS(0)                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                         \
    }                                                                                                              \
  };
DEFINE_WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

// One k256 step: a row is 256 bits = 32 bytes = two 16-byte chunks. Without swizzle the unit of the layout is the core
// matrix, 8 rows of one chunk stored back to back. The two core matrices of a row group follow each other, then comes
// the next row group: one step along K is kCore bytes, one step of 8 rows is 2 * kCore.
constexpr int kRowBytes = 32;
constexpr int kChunk = 16;
constexpr int kCore = 8 * kChunk;

__device__ int tile_offset(int row, int byte) {
  int row_group = row >> 3, chunk = byte / kChunk;
  return (2 * row_group + chunk) * kCore + (row & 7) * kChunk + byte % kChunk;
}

// PTX ISA, matrix descriptor of wgmma: 14-bit fields that hold byte quantities in units of 16. Bits 0-13 start address,
// 16-29 leading-dimension offset (K, here), 32-45 stride-dimension offset (rows). Base offset (49-51) and swizzle mode
// (62-63) stay zero.
__device__ __forceinline__ uint64_t tile_descriptor(const uint8_t* tile) {
  constexpr uint64_t steps = uint64_t(kCore / 16) << 16 | uint64_t(2 * kCore / 16) << 32;
  uint64_t start = __cvta_generic_to_shared(tile);
  return steps | (start % (1u << 18)) / 16;
}

__device__ __forceinline__ void warpgroup_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_close() {
  asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// What threads stored in shared memory becomes visible to the tensor core's own path.
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// a: 64 rows, b: 256 rows of 32 bytes, row-major. counts[i][j] = popcount(a[i] & b[j]).
template <bool FromRegisters>
__global__ void __launch_bounds__(128) layout_kernel(const uint8_t* a, const uint8_t* b, int* counts) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *tile_a = shared, *tile_b = shared + 64 * kRowBytes;
  for (int i = threadIdx.x; i < 64 * kRowBytes; i += 128) tile_a[tile_offset(i / kRowBytes, i % kRowBytes)] = a[i];
  for (int i = threadIdx.x; i < 256 * kRowBytes; i += 128) tile_b[tile_offset(i / kRowBytes, i % kRowBytes)] = b[i];
  publish_shared();

  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, word = lane % 4;
  int d[128] = {};
  if constexpr (FromRegisters) {
    // The layout under test: rows `row` and `row + 8`, words `word` and `word + 4` of the eight words in a row.
    const uint32_t* words = reinterpret_cast<const uint32_t*>(a);
    uint32_t fragment[4] = {words[row * 8 + word], words[(row + 8) * 8 + word], words[row * 8 + word + 4],
                            words[(row + 8) * 8 + word + 4]};
    warpgroup_open();
    Wgmma<256>::rs(d, fragment, tile_descriptor(tile_b), 0);
  } else {
    warpgroup_open();
    Wgmma<256>::ss(d, tile_descriptor(tile_a), tile_descriptor(tile_b), 0);
  }
  warpgroup_close();

  for (int j = 0; j < 32; j++)
    for (int r = 0; r < 4; r++) counts[(row + r / 2 * 8) * 256 + j * 8 + word * 2 + r % 2] = d[4 * j + r];
}

// Thread 0 of block 0 reports the cycles between the two barriers of its block.
struct Stopwatch {
  long long begin;
  __device__ Stopwatch() {
    __syncthreads();
    begin = clock64();
  }
  __device__ void report(long long* cycles) const {
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = clock64() - begin;
  }
};

// Each warpgroup issues `rounds` groups of Depth instructions on each of Tiles accumulators, and waits after each
// group. Depth 1 is what a kernel does that looks at every product; a larger one shows the pipe without the wait.
template <int N, bool FromRegisters, int Tiles, int Depth>
__global__ void __launch_bounds__(384) wgmma_kernel(int* sink, long long* cycles, int rounds) {
  extern __shared__ __align__(1024) uint8_t shared[];
  for (int i = threadIdx.x; i < 320 * kRowBytes / 4; i += blockDim.x)
    reinterpret_cast<uint32_t*>(shared)[i] = i * 2654435761u;
  publish_shared();
  uint32_t fragment[4] = {threadIdx.x * 7u, threadIdx.x * 11u, threadIdx.x * 13u, threadIdx.x * 17u};
  uint64_t a = tile_descriptor(shared), b = tile_descriptor(shared + 64 * kRowBytes);
  int d[Tiles * N / 2] = {};

  Stopwatch watch;
  for (int i = 0; i < rounds; i++) {
    warpgroup_open();
#pragma unroll
    for (int step = 0; step < Depth; step++) {
#pragma unroll
      for (int tile = 0; tile < Tiles; tile++) {
        if constexpr (FromRegisters)
          Wgmma<N>::rs(d + tile * (N / 2), fragment, b, 1);
        else
          Wgmma<N>::ss(d + tile * (N / 2), a, b, 1);
      }
    }
    warpgroup_close();
  }
  watch.report(cycles);

  int sum = 0;
  for (int i = 0; i < Tiles * N / 2; i++) sum += d[i];
  if (sum == 0x12345) *sink = sum;
}

// --- mma.sync ---

// Chains independent products a warp, so that the latency of one hides behind the others.
#define DEFINE_MMA(NAME, INSTRUCTION, OPERANDS)                                                                     \
  template <int Chains>                                                                                             \
  __global__ void __launch_bounds__(512) NAME(int* sink, long long* cycles, int rounds) {                           \
    uint32_t a0 = threadIdx.x, a1 = a0 * 3, a2 = a0 * 5, a3 = a0 * 7, b0 = a0 * 9, b1 = a0 * 11;                    \
    int d[Chains][4] = {};                                                                                          \
    Stopwatch watch;                                                                                                \
    for (int i = 0; i < rounds; i++) {                                                                              \
      _Pragma("unroll") for (int u = 0; u < Chains; u++) asm volatile(                                              \
          INSTRUCTION " {%0,%1,%2,%3}, " OPERANDS ", {%0,%1,%2,%3};" : "+r"(d[u][0]), "+r"(d[u][1]), "+r"(d[u][2]), \
          "+r"(d[u][3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                    \
    }                                                                                                               \
    watch.report(cycles);                                                                                           \
    int sum = 0;                                                                                                    \
    for (int u = 0; u < Chains; u++) sum += d[u][0] + d[u][1] + d[u][2] + d[u][3];                                  \
    if (sum == 0x12345) *sink = sum;                                                                                \
  }
DEFINE_MMA(mma_and256, "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", "{%4,%5,%6,%7}, {%8,%9}")
DEFINE_MMA(mma_xor256, "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc", "{%4,%5,%6,%7}, {%8,%9}")
DEFINE_MMA(mma_and128, "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc", "{%4,%5}, {%8}")
DEFINE_MMA(mma_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "{%4,%5,%6,%7}, {%8,%9}")

// --- plain instructions ---

// BODY updates r[u]; x and y do not change. Eight chains a thread, 64 warps a multiprocessor. The compiler unrolls by
// four, so the loop counter adds 2 ALU instructions to every 32 measured: a full-rate ALU operation can read as low as
// 60 of 64.
#define DEFINE_PLAIN(NAME, BODY)                                                           \
  __global__ void __launch_bounds__(1024) NAME(int* sink, long long* cycles, int rounds) { \
    unsigned r[8], x = threadIdx.x | 1, y = blockIdx.x * 77 + 5;                           \
    for (int u = 0; u < 8; u++) r[u] = x * (u + 3) + y;                                    \
    Stopwatch watch;                                                                       \
    for (int i = 0; i < rounds; i++) {                                                     \
      _Pragma("unroll") for (int u = 0; u < 8; u++) { BODY; }                              \
    }                                                                                      \
    watch.report(cycles);                                                                  \
    unsigned mix = 0;                                                                      \
    for (int u = 0; u < 8; u++) mix ^= r[u];                                               \
    if (mix == 0x12345) *sink = mix;                                                       \
  }
DEFINE_PLAIN(plain_popc, asm volatile("popc.b32 %0, %0;" : "+r"(r[u])))
DEFINE_PLAIN(plain_lop3, asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;" : "+r"(r[u]) : "r"(x), "r"(y)))
DEFINE_PLAIN(plain_imad, asm volatile("mad.lo.s32 %0, %0, %1, %2;" : "+r"(r[u]) : "r"(x), "r"(y)))
DEFINE_PLAIN(plain_vimnmx3, r[u] = __vimin3_s32(r[u], r[(u + 3) & 7], int(y)))
DEFINE_PLAIN(plain_vimnmx3_relu, r[u] = __vimin3_s32_relu(r[u], r[(u + 3) & 7], int(y)))
DEFINE_PLAIN(plain_vimnmx3_s16x2, r[u] = __vimin3_s16x2(r[u], r[(u + 3) & 7], y))
DEFINE_PLAIN(plain_vimnmx_s16x2, r[u] = __vmins2(r[u], r[(u + 3) & 7]))

// --- host ---

int* g_sink;
long long* g_cycles;
int g_sms;

struct Sample {
  double seconds = 1e30;
  double cycles = 1e30;
};

// Best of five after one warm-up.
template <class Launch>
Sample measure(Launch launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  Sample best;
  for (int run = 0; run < 6; run++) {
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaGetLastError());
    float ms;
    long long cycles;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    CHECK(cudaMemcpy(&cycles, g_cycles, sizeof cycles, cudaMemcpyDeviceToHost));
    if (run == 0) continue;
    if (ms * 1e-3 < best.seconds) best.seconds = ms * 1e-3;
    if (double(cycles) < best.cycles) best.cycles = double(cycles);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return best;
}

bool check_layouts() {
  bool is_right = true;
  std::vector<uint8_t> a(64 * kRowBytes), b(256 * kRowBytes);
  std::vector<int> counts(64 * 256);
  std::srand(1);
  for (auto& byte : a) byte = uint8_t(std::rand());
  for (auto& byte : b) byte = uint8_t(std::rand());
  uint8_t *device_a, *device_b;
  int* device_counts;
  CHECK(cudaMalloc(&device_a, a.size()));
  CHECK(cudaMalloc(&device_b, b.size()));
  CHECK(cudaMalloc(&device_counts, counts.size() * sizeof(int)));
  CHECK(cudaMemcpy(device_a, a.data(), a.size(), cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(device_b, b.data(), b.size(), cudaMemcpyHostToDevice));
  for (bool from_registers : {false, true}) {
    CHECK(cudaMemset(device_counts, 0xff, counts.size() * sizeof(int)));
    auto kernel = from_registers ? layout_kernel<true> : layout_kernel<false>;
    kernel<<<1, 128, 320 * kRowBytes>>>(device_a, device_b, device_counts);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(counts.data(), device_counts, counts.size() * sizeof(int), cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (int i = 0; i < 64; i++)
      for (int j = 0; j < 256; j++) {
        int expected = 0;
        for (int k = 0; k < kRowBytes; k++) expected += __builtin_popcount(a[i * kRowBytes + k] & b[j * kRowBytes + k]);
        wrong += counts[i * 256 + j] != expected;
      }
    is_right &= wrong == 0;
    std::printf("layout %s: %s (%d of %zu wrong)\n", from_registers ? "RS" : "SS", wrong ? "WRONG" : "ok", wrong,
                counts.size());
  }
  CHECK(cudaFree(device_a));
  CHECK(cudaFree(device_b));
  CHECK(cudaFree(device_counts));
  return is_right;
}

template <int N, bool FromRegisters, int Tiles, int Depth>
void bench_wgmma() {
  constexpr int rounds = 16000 / (Tiles * Depth);
  for (int groups = 1; groups <= 3; groups++) {
    Sample s = measure([&] {
      wgmma_kernel<N, FromRegisters, Tiles, Depth><<<g_sms, 128 * groups, 320 * kRowBytes>>>(g_sink, g_cycles, rounds);
    });
    double issued = double(rounds) * Tiles * Depth * groups;  // instructions per multiprocessor
    std::printf(
        "wgmma m64n%-3dk256 %s tiles=%d depth=%d warpgroups=%d: %6.1f cycles, %6.1f dist/clk/SM, "
        "%6.0f TOPS at %.0f MHz\n",
        N, FromRegisters ? "RS" : "SS", Tiles, Depth, groups, s.cycles / issued, issued * 64 * N / s.cycles,
        issued * g_sms * 64 * N * 256 * 2 / s.seconds / 1e12, s.cycles / s.seconds / 1e6);
  }
}

template <int N>
void bench_wgmma_shape() {
  bench_wgmma<N, false, 1, 1>();
  bench_wgmma<N, false, 1, 8>();
  bench_wgmma<N, true, 1, 1>();
  bench_wgmma<N, true, 1, 8>();
  if constexpr (N <= 128) {
    bench_wgmma<N, false, 2, 1>();
    bench_wgmma<N, true, 2, 1>();
  }
}

template <int Chains, class Kernel>
void bench_mma(const char* name, Kernel kernel, double macs) {
  constexpr int rounds = 4000, blocks = 2, warps = 16;  // blocks per multiprocessor, warps per block
  Sample s = measure([&] { kernel<<<g_sms * blocks, 32 * warps>>>(g_sink, g_cycles, rounds); });
  double issued = double(rounds) * Chains * warps * blocks;
  std::printf("%-10s chains=%d: %6.3f MMA/clk/SM, %6.0f TOPS at %.0f MHz\n", name, Chains, issued / s.cycles,
              issued * g_sms * 2 * macs / s.seconds / 1e12, s.cycles / s.seconds / 1e6);
}

template <class Kernel>
void bench_plain(const char* name, Kernel kernel) {
  constexpr int rounds = 8000, blocks = 2;
  Sample s = measure([&] { kernel<<<g_sms * blocks, 1024>>>(g_sink, g_cycles, rounds); });
  std::printf("%-20s: %5.1f lanes/clk/SM at %.0f MHz\n", name, double(rounds) * 8 * 1024 * blocks / s.cycles,
              s.cycles / s.seconds / 1e6);
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    std::fprintf(stderr, "%s has compute capability %d.%d; this binary runs on 9.0 only\n", device.name, device.major,
                 device.minor);
    return 1;
  }
  int max_khz = 0;
  CHECK(cudaDeviceGetAttribute(&max_khz, cudaDevAttrClockRate, 0));
  g_sms = device.multiProcessorCount;
  std::printf("%s: %d SMs, at most %.0f MHz, L2 %d MB\n", device.name, g_sms, max_khz * 1e-3,
              int(device.l2CacheSize >> 20));
  CHECK(cudaMalloc(&g_sink, sizeof *g_sink));
  CHECK(cudaMalloc(&g_cycles, sizeof *g_cycles));

  const bool is_right = check_layouts();
  bench_wgmma_shape<8>();
  bench_wgmma_shape<16>();
  bench_wgmma_shape<32>();
  bench_wgmma_shape<64>();
  bench_wgmma_shape<128>();
  bench_wgmma_shape<256>();
  bench_mma<4>("mma_and256", mma_and256<4>, 16 * 8 * 256);
  bench_mma<8>("mma_and256", mma_and256<8>, 16 * 8 * 256);
  bench_mma<4>("mma_xor256", mma_xor256<4>, 16 * 8 * 256);
  bench_mma<8>("mma_and128", mma_and128<8>, 16 * 8 * 128);
  bench_mma<8>("mma_s8", mma_s8<8>, 16 * 8 * 32);
  bench_plain("popc", plain_popc);
  bench_plain("lop3", plain_lop3);
  bench_plain("imad", plain_imad);
  bench_plain("vimnmx3.s32", plain_vimnmx3);
  bench_plain("vimnmx3.s32.relu", plain_vimnmx3_relu);
  bench_plain("vimnmx3.s16x2", plain_vimnmx3_s16x2);
  bench_plain("vimnmx.s16x2", plain_vimnmx_s16x2);
  return is_right ? 0 : 1;
}

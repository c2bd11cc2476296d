// Hopper's 1-bit matrix instruction `wgmma`. It is executed by a warpgroup (four warps), and multiplies 64 rows in
// registers by 256 columns in shared memory. bit_matrix.cuh describes the layout.
#pragma once

#include "cuda/hamming/bit_matrix.cuh"

namespace hashengine {

#if defined(__CUDACC__)

// HE_SUMSn(constraint, i) lists the sums i to i + n - 1 as operands of an asm statement.
#define HE_SUMS4(constraint, i) \
  constraint(sums[i]), constraint(sums[i + 1]), constraint(sums[i + 2]), constraint(sums[i + 3])
#define HE_SUMS16(constraint, i) \
  HE_SUMS4(constraint, i), HE_SUMS4(constraint, i + 4), HE_SUMS4(constraint, i + 8), HE_SUMS4(constraint, i + 12)
#define HE_SUMS64(constraint, i) \
  HE_SUMS16(constraint, i), HE_SUMS16(constraint, i + 16), HE_SUMS16(constraint, i + 32), HE_SUMS16(constraint, i + 48)

// The instruction. `accumulate` is "1" if the product is added to the sums, otherwise "0".
#define HE_WGMMA(constraint, accumulate)                                                                        \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " accumulate                                 \
               ", 0;\n"                                                                                         \
               "wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc {"                                  \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"                \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"                \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"                \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"                \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"    \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
               "}, {%128, %129, %130, %131}, %132, accumulate;\n}"                                              \
               : HE_SUMS64(constraint, 0), HE_SUMS64(constraint, 64)                                            \
               : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(columns))

// Starts to compute popcount(rows & columns). If kAccumulate is true, the result is added to the sums; otherwise it
// replaces them, and they need no value before. `columns` is the descriptor of a tile of columns. Until wgmma_wait()
// returns, only further calls of this function may access `sums` and `rows`, and the columns must not be written. To
// keep the compiler from accessing `rows` in between, call pin_registers(rows) before wgmma_fence() and after
// wgmma_wait(). All threads of the warpgroup must call this function.
template <bool kAccumulate>
__device__ __forceinline__ void wgmma_and_popcount(uint32_t (&sums)[kWgmmaSums], const uint32_t (&rows)[4],
                                                   uint64_t columns) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kAccumulate)
    HE_WGMMA("+r", "1");
  else
    HE_WGMMA("=r", "0");
#endif
}

// Makes the registers that the thread has written visible to the matrix unit. Call it before the first of several
// wgmma_and_popcount().
__device__ __forceinline__ void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Waits for all calls of wgmma_and_popcount() since wgmma_fence(). The sums are operands, so that the compiler does not
// read them before the wait.
__device__ __forceinline__ void wgmma_wait(uint32_t (&sums)[kWgmmaSums]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
               : HE_SUMS64("+r", 0), HE_SUMS64("+r", 64)
               :
               : "memory");
#endif
}

#undef HE_SUMS4
#undef HE_SUMS16
#undef HE_SUMS64
#undef HE_WGMMA

#else

template <bool kAccumulate>
__device__ __forceinline__ void wgmma_and_popcount(uint32_t (&sums)[kWgmmaSums], const uint32_t (&rows)[4],
                                                   uint64_t columns) {
  emulation::wgmma_and_popcount(sums, kWgmmaSums, rows, columns, kAccumulate);
}
__device__ __forceinline__ void wgmma_fence() { emulation::wgmma_fence(); }
__device__ __forceinline__ void wgmma_wait(uint32_t (&)[kWgmmaSums]) { emulation::wgmma_wait(); }

#endif

}  // namespace hashengine

// The launchers of csrc/cuda for ctypes; emulation_take_error tells how it went.

#include "hashengine/greedy_sign.h"
#include "hashengine/pack_bits.h"

using namespace hashengine;

extern "C" {

int64_t workspace_bytes(int64_t numel) { return greedy_sign_workspace_bytes(numel); }

void greedy_sign_forward(const void* u, void* b, void* penalty, int64_t numel, double alpha, int dtype,
                         void* workspace) {
  launch_greedy_sign_forward({u, b, penalty, numel, alpha, Dtype(dtype)}, workspace, nullptr);
}

void greedy_sign_backward(const void* grad_b, const void* grad_penalty, const void* u, void* grad_u, int64_t numel,
                          double alpha, int dtype) {
  launch_greedy_sign_backward({grad_b, grad_penalty, u, grad_u, numel, alpha, Dtype(dtype)}, nullptr);
}

void pack_bits(const void* u, uint8_t* codes, int64_t bytes, int dtype) {
  launch_pack_bits({u, codes, bytes, Dtype(dtype)}, nullptr);
}

void unpack_bits(const uint8_t* codes, bool* bits, int64_t bytes) {
  launch_unpack_bits({codes, bits, bytes}, nullptr);
}

}  // extern "C"

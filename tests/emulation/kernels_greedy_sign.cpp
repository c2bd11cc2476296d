#include "hashengine/greedy_sign.h"

using namespace hashengine;

extern "C" {

int64_t workspace_bytes_of_greedy_sign(int64_t numel) { return greedy_sign_workspace_bytes(numel); }

void greedy_sign_forward(const void* u, void* b, void* penalty, int64_t numel, double alpha, int dtype,
                         void* workspace) {
  launch_greedy_sign_forward({u, b, penalty, numel, alpha, Dtype(dtype)}, workspace, nullptr);
}

void greedy_sign_backward(const void* grad_b, const void* grad_penalty, const void* u, void* grad_u, int64_t numel,
                          double alpha, int dtype) {
  launch_greedy_sign_backward({grad_b, grad_penalty, u, grad_u, numel, alpha, Dtype(dtype)}, nullptr);
}

}  // extern "C"

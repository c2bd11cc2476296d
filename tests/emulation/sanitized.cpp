// Runs every kernel over arrays of exactly their size, for a build with -fsanitize=address,undefined: a read or write
// outside an array, or through a misaligned vector, ends the program. With the argument "overrun" it runs a kernel that
// does write outside, to show that this would be seen.

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "hashengine/greedy_sign.h"
#include "hashengine/pack_bits.h"

using namespace hashengine;

extern "C" {
void emulation_set_schedule(int schedule);
const char* emulation_take_error();
void toy_overrun(float* out, int threads);
}

namespace {

// `bytes` on the heap, `offset` past a 16-byte boundary, poisoned, with nothing behind them.
class Array {
 public:
  Array(int64_t bytes, int64_t offset, int fill = 0xff) : memory_(new char[size_t(offset + bytes)]), offset_(offset) {
    std::memset(memory_.get(), fill, size_t(offset + bytes));
  }
  template <typename T = void>
  T* get() {
    return static_cast<T*>(static_cast<void*>(memory_.get() + offset_));
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t offset_;
};

void run_greedy_sign(Dtype dtype, int64_t size, int64_t numel, int64_t offset) {
  const int64_t bytes = numel * size;
  Array u(bytes, offset * size, 0x3c), b(bytes, offset * size), grad_u(bytes, 0), penalty(8, 0), grad_penalty(8, 0, 0);
  Array workspace(greedy_sign_workspace_bytes(numel), 0);
  launch_greedy_sign_forward({u.get(), b.get(), penalty.get(), numel, 0.1, dtype}, workspace.get(), nullptr);
  launch_greedy_sign_backward({b.get(), grad_penalty.get(), u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
  launch_greedy_sign_backward({nullptr, grad_penalty.get(), u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
  launch_greedy_sign_backward({b.get(), nullptr, u.get(), grad_u.get(), numel, 0.1, dtype}, nullptr);
}

void run_packing(Dtype dtype, int64_t size, int64_t bytes, int64_t offset) {
  Array u(8 * bytes * size, offset * size, 1), codes(bytes, offset), bits(8 * bytes, offset);
  launch_pack_bits({u.get(), codes.get<uint8_t>(), bytes, dtype}, nullptr);
  launch_unpack_bits({codes.get<uint8_t>(), bits.get<bool>(), bytes}, nullptr);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "overrun") == 0) {
    Array out(32 * sizeof(float), 0);
    toy_overrun(out.get<float>(), 32);
    return 0;
  }
  const struct {
    Dtype dtype;
    int64_t size;
  } types[] = {
      {Dtype::kFloat64, 8}, {Dtype::kFloat32, 4}, {Dtype::kFloat16, 2}, {Dtype::kBFloat16, 2}, {Dtype::kBool, 1},
  };
  for (int schedule : {0, 1, 2}) {
    emulation_set_schedule(schedule);
    for (const auto& type : types) {
      for (int64_t offset : {0, 1}) {
        for (int64_t numel : {0, 1, 33, 520, 20481})
          if (type.dtype != Dtype::kBool) run_greedy_sign(type.dtype, type.size, numel, offset);
        for (int64_t bytes : {0, 1, 3, 300, 1025}) run_packing(type.dtype, type.size, bytes, offset);
      }
    }
  }
  const char* error = emulation_take_error();
  std::puts(*error ? error : "clean");
  return *error ? 1 : 0;
}

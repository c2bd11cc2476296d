// Runs the kernels of the op that the first argument names, in a build with -fsanitize=address,undefined. An access
// outside an array or through a misaligned vector ends the program. Some names run a toy kernel with a known mistake,
// to test that the sanitizers detect it.

#include "sanitized.h"

#include <cstdio>

extern "C" {
void emulation_set_schedule(int schedule);
const char* emulation_take_error();
void toy_overrun(float* out, int threads);
void toy_dynamic_overrun();
void toy_misaligned(float* out);
void toy_exited_peer(float* out, bool maps_late);
}

namespace {

const Sanitized overrun("overrun", [] {
  Array out(32 * sizeof(float), 0);
  toy_overrun(out.get<float>(), 32);
});
const Sanitized misaligned("misaligned", [] {
  Array out(4 * sizeof(float), 0);
  toy_misaligned(out.get<float>());
});
const Sanitized dynamic_overrun("dynamic_overrun", toy_dynamic_overrun);
const Sanitized exited_peer("exited_peer", [] {
  Array out(sizeof(float), 0);
  toy_exited_peer(out.get<float>(), false);
});

}  // namespace

int main(int count, char** arguments) {
  const auto run = Sanitized::all().find(count > 1 ? arguments[1] : "");
  if (run == Sanitized::all().end()) return std::puts("sanitized: the argument must be the name of an op"), 2;
  for (int schedule : {0, 1, 2}) {
    emulation_set_schedule(schedule);
    run->second();
    const char* error = emulation_take_error();
    if (*error) return std::puts(error), 1;
  }
  std::puts("clean");
}

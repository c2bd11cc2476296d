// Reads calls of hamming_call from standard input until its end, and writes the answers to standard output. One process
// in an emulator of another CPU can thereby serve many calls. With an argument, the program only prints the chosen SIMD
// level.

#include <cstdio>
#include <stdexcept>
#include <vector>

#include "hashengine/simd_level.h"

extern "C" void hamming_call(const int64_t* numbers, void* const* buffers);

namespace {

constexpr int kNumbers = 9, kBuffers = 8, kFirstOutput = 5;

template <typename T>
bool read(std::vector<T>& values) {
  return std::fread(values.data(), sizeof(T), values.size(), stdin) == values.size();
}

int print_level() try {
  std::puts(hashengine::simd_level_name(hashengine::chosen_simd_level()));
  return 0;
} catch (const std::invalid_argument& error) {
  std::puts(error.what());
  return 1;
}

}  // namespace

// A call consists of the numbers, the size of each buffer in bytes (0: a null pointer), and the buffers. An answer
// consists of the outputs.
int main(int argc, char**) {
  if (argc > 1) return print_level();
  std::vector<int64_t> numbers(kNumbers), sizes(kBuffers);
  while (read(numbers) && read(sizes)) {
    std::vector<std::vector<uint8_t>> contents;
    void* buffers[kBuffers];
    for (int i = 0; i < kBuffers; ++i) {
      contents.emplace_back(size_t(sizes[size_t(i)]));
      if (!read(contents.back())) return 1;
      buffers[i] = contents.back().empty() ? nullptr : contents.back().data();
    }
    hamming_call(numbers.data(), buffers);
    for (size_t i = kFirstOutput; i < kBuffers; ++i) std::fwrite(contents[i].data(), 1, contents[i].size(), stdout);
    std::fflush(stdout);
  }
}

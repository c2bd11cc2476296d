// Code that the sanitized_<op>.cpp files share. Each of these files runs an op's kernels on arrays of exactly the
// required size.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "hashengine/types.h"

extern "C" void emulation_synchronise();

// An array of exactly `bytes` bytes on the heap, `offset` bytes after a 16-byte boundary, filled with `fill`.
class Array {
 public:
  ~Array() { emulation_synchronise(); }  // kernels that use the array may not have run yet
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
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

struct ElementType {
  hashengine::Dtype dtype;
  int64_t size;
};
constexpr ElementType kFloatingTypes[] = {
    {hashengine::Dtype::kFloat64, 8},
    {hashengine::Dtype::kFloat32, 4},
    {hashengine::Dtype::kFloat16, 2},
    {hashengine::Dtype::kBFloat16, 2},
};

// The registry of ops by name. An op registers itself with `const Sanitized op("op", run);`.
class Sanitized {
 public:
  Sanitized(const char* name, void (*run)()) { all()[name] = run; }
  static std::map<std::string, void (*)()>& all() {
    static std::map<std::string, void (*)()> runs;
    return runs;
  }
};

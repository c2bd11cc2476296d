#include "hashengine/pack_bits.h"
#include "sanitized.h"

using namespace hashengine;

namespace {

void run_one(Dtype dtype, int64_t size, int64_t bytes, int64_t offset) {
  Array u(8 * bytes * size, offset * size, 1), codes(bytes, offset), bits(8 * bytes, offset);
  launch_pack_bits({u.get(), codes.get<uint8_t>(), bytes, dtype}, nullptr);
  launch_unpack_bits({codes.get<uint8_t>(), bits.get<bool>(), bytes}, nullptr);
}

const Sanitized pack_bits("pack_bits", [] {
  for (int64_t offset : {0, 1}) {
    for (int64_t bytes : {0, 1, 3, 300, 1025}) {
      for (const auto& type : kFloatingTypes) run_one(type.dtype, type.size, bytes, offset);
      run_one(Dtype::kBool, 1, bytes, offset);
    }
  }
});

}  // namespace

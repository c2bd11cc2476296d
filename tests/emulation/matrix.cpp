// Emulated matrix instructions. Each lane of a warp gathers the words of its rows from the other lanes. It gathers the
// words of its columns in the same way (mma) or reads them from shared memory (wgmma). Then it computes its own sums.

#include "emulator.h"
#include "matrix_instructions.h"

namespace emulation {
namespace {

constexpr unsigned kWords = 8;  // per row or column
constexpr unsigned kWholeWarp = ~0u;
constexpr uint32_t kInvalid = 0xa5a5a5a5u;  // the value of wgmma's sums until wgmma_wait()

// The two rows of which the calling lane computes sums: rows g and g + 8 of the warp, with g = lane / 4. Lane 4g + t
// holds words t and t + 4 of both rows.
struct Rows {
  uint32_t words[2][kWords];

  explicit Rows(const uint32_t* own, const char* operation) {
    for (unsigned half = 0; half < 2; ++half) {  // own: word t of row g and of row g + 8, then word t + 4 of both
      const Lanes lanes = gather_lanes(kWholeWarp, operation, own[2 * half] | uint64_t(own[2 * half + 1]) << 32);
      for (unsigned t = 0; t < 4; ++t) {
        const uint64_t pair = lanes.bits[lane() / 4 * 4 + t];
        words[0][t + 4 * half] = uint32_t(pair);
        words[1][t + 4 * half] = uint32_t(pair >> 32);
      }
    }
  }

  uint32_t product(unsigned row, const uint32_t (&column)[kWords]) const {
    uint32_t sum = 0;
    for (unsigned word = 0; word < kWords; ++word) sum += uint32_t(__popc(words[row][word] & column[word]));
    return sum;
  }
};

unsigned column_of(unsigned sum) { return 8 * (sum / 4) + 2 * (lane() % 4) + sum % 2; }

}  // namespace

void mma_and_popcount(uint32_t* sums, const uint32_t* rows, const uint32_t* columns, const uint32_t* before) {
  const Rows own(rows, "mma");
  const Lanes lanes = gather_lanes(kWholeWarp, "mma", columns[0] | uint64_t(columns[1]) << 32);
  for (unsigned sum = 0; sum < 4; ++sum) {
    uint32_t column[kWords];
    for (unsigned t = 0; t < 4; ++t) {
      const uint64_t pair = lanes.bits[4 * column_of(sum) + t];
      column[t] = uint32_t(pair);
      column[t + 4] = uint32_t(pair >> 32);
    }
    sums[sum] = before[sum] + own.product(sum / 2, column);
  }
}

void wgmma_fence() { gather_lanes(kWholeWarp, "wgmma.fence", 0); }

void wgmma_and_popcount(uint32_t* sums, unsigned count, const uint32_t* rows, const uint32_t* columns,
                        bool accumulate) {
  if (block().fibers.size() % 128)
    fail("wgmma: the block must consist of whole warpgroups, got %zu threads", block().fibers.size());
  MatrixProduct product{sums, std::vector<uint32_t>(sums, sums + count), {}, columns, accumulate};
  std::copy_n(rows, 4, product.rows);
  std::fill_n(sums, count, kInvalid);
  fiber().products.push_back(std::move(product));
}

void wgmma_wait() {
  std::vector<MatrixProduct> products = std::move(fiber().products);
  fiber().products.clear();
  for (size_t i = 0; i < products.size(); ++i) {
    const MatrixProduct& product = products[i];
    const bool is_first = std::none_of(products.begin(), products.begin() + long(i),
                                       [&](const MatrixProduct& earlier) { return earlier.sums == product.sums; });
    if (is_first) std::copy(product.before.begin(), product.before.end(), product.sums);
    const Rows own(product.rows, "wgmma");
    for (unsigned sum = 0; sum < product.before.size(); ++sum) {
      uint32_t column[kWords];
      const unsigned index = column_of(sum);
      for (unsigned word = 0; word < kWords; ++word)  // a tile consists of core matrices of 8 columns by 4 words
        column[word] = product.columns[(2 * (index / 8) + word / 4) * 32 + index % 8 * 4 + word % 4];
      product.sums[sum] = (product.accumulate ? product.sums[sum] : 0) + own.product(sum / 2 % 2, column);
    }
  }
}

}  // namespace emulation

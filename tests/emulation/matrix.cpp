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

constexpr unsigned kWarpgroupThreads = 128;

std::vector<MatrixOperation>& operations_of_warpgroup() {
  block().matrix_operations.resize(block().fibers.size() / kWarpgroupThreads);
  return block().matrix_operations[running % kMaxThreads / kWarpgroupThreads];
}

// A matrix descriptor of wgmma for 1-bit columns without swizzle (the PTX manual, "matrix descriptor").
struct ColumnTile {
  uint32_t begin, matrix_stride, group_stride;  // in bytes

  explicit ColumnTile(uint64_t descriptor)
      : begin(16 * uint32_t(descriptor & 0x3fff)),
        matrix_stride(16 * uint32_t(descriptor >> 16 & 0x3fff)),
        group_stride(16 * uint32_t(descriptor >> 32 & 0x3fff)) {
    constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32;
    if (descriptor & ~kFields) fail("wgmma: the descriptor %016llx has other fields", (unsigned long long)descriptor);
  }

  uint32_t word(unsigned column, unsigned word) const {
    constexpr unsigned kColumns = 8, kMatrixWords = 4;  // a core matrix has 16 bytes of each of eight columns
    const uint32_t matrix = begin + column / kColumns * group_stride + word / kMatrixWords * matrix_stride;
    return *at_shared_address(matrix + 16 * (column % kColumns) + 4 * (word % kMatrixWords), 4);
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

void wgmma_fence() {
  gather_lanes(kWholeWarp, "wgmma.fence", 0);
  fiber().has_fenced = true;
}

void wgmma_and_popcount(uint32_t* sums, unsigned count, const uint32_t* rows, uint64_t columns, bool accumulate) {
  if (block().fibers.size() % kWarpgroupThreads)
    fail("wgmma: the block must consist of whole warpgroups, got %zu threads", block().fibers.size());
  if (!fiber().has_fenced) fail("wgmma: wgmma_fence() must come before the first wgmma after a wait");
  const MatrixOperation operation{columns, count, accumulate};
  std::vector<MatrixOperation>& group = operations_of_warpgroup();
  const size_t number = fiber().started_products++;
  if (number == group.size()) group.push_back(operation);
  if (!(group[number] == operation)) fail("wgmma: the threads of a warpgroup start different products");
  MatrixProduct product{sums, std::vector<uint32_t>(sums, sums + count), rows, {}, columns, accumulate};
  std::copy_n(rows, 4, product.rows_before);
  std::fill_n(sums, count, kInvalid);
  fiber().products.push_back(std::move(product));
}

void check_products() {
  const std::vector<std::vector<MatrixOperation>>& groups = block().matrix_operations;
  for (unsigned thread = 0; thread < kWarpgroupThreads * groups.size(); ++thread)
    if (block().fibers[thread].started_products != groups[thread / kWarpgroupThreads].size())
      fail("wgmma: a thread has started fewer products than its warpgroup");
}

void wgmma_wait() {
  fiber().has_fenced = false;
  std::vector<MatrixProduct> products = std::move(fiber().products);
  fiber().products.clear();
  for (size_t i = 0; i < products.size(); ++i) {
    const MatrixProduct& product = products[i];
    const bool is_first = std::none_of(products.begin(), products.begin() + long(i),
                                       [&](const MatrixProduct& earlier) { return earlier.sums == product.sums; });
    if (is_first) std::copy(product.before.begin(), product.before.end(), product.sums);
    if (!std::equal(product.rows, product.rows + 4, product.rows_before))
      fail("wgmma: the rows have changed before wgmma_wait()");
    const Rows own(product.rows_before, "wgmma");
    const ColumnTile tile(product.columns);
    for (unsigned sum = 0; sum < product.before.size(); ++sum) {
      uint32_t column[kWords];
      const unsigned index = column_of(sum);
      for (unsigned word = 0; word < kWords; ++word) column[word] = tile.word(index, word);
      product.sums[sum] = (product.accumulate ? product.sums[sum] : 0) + own.product(sum / 2 % 2, column);
    }
  }
}

}  // namespace emulation

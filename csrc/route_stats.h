// Router output -> tokens per expert -> integer statistics. Includes neither
// torch nor Python.
//
// The statistics are numerators: readers divide, so that every backend stores
// the same bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace dodoco {

struct PassTotals {
  std::uint64_t tokens = 0;
  std::uint64_t assignments = 0;
  std::uint64_t padded = 0;
  std::uint64_t invalid = 0;
  std::uint64_t capacity_dropped = 0;
};

struct PassStatistics {
  std::uint64_t gini_numerator = 0;  // sum over pairs i < j of |c_i - c_j|
  std::uint32_t assignments = 0;
  std::uint32_t max_count = 0;
  std::uint32_t unused_experts = 0;
};

// Adds ids [rows, k] to histogram [num_experts + 2], whose last two bins take
// padding and invalid ids. Strides in elements. Returns the rows that are not
// all padding.
template <typename Id>
std::uint64_t count_ids(const Id* ids, std::int64_t rows, std::int64_t k, std::int64_t row_stride,
                        std::int64_t slot_stride, std::uint32_t num_experts,
                        std::uint32_t* histogram) {
  if (k == 0) return 0;
  const bool dense = slot_stride == 1 && row_stride == k;
  const std::int64_t lines = dense ? 1 : rows, length = dense ? rows * k : k;
  const Id* line = ids;
  for (std::int64_t i = 0; i < lines; ++i, line += row_stride) {
#pragma GCC unroll 4
    for (std::int64_t slot = 0; slot < length; ++slot) {
      // Compared before narrowing: 2^32 + 3 is not expert 3. What is out of
      // range shares a bin.
      const auto id = static_cast<std::uint64_t>(std::int64_t{line[slot * slot_stride]});
      ++histogram[std::min<std::uint64_t>(id, num_experts)];
    }
  }
  if (histogram[num_experts] == 0) return static_cast<std::uint64_t>(rows);

  // Rare, so it costs a second look and not a comparison in the loop above.
  std::uint64_t tokens = 0;
  std::uint32_t padded = 0;
  for (std::int64_t row = 0; row < rows; ++row, ids += row_stride) {
    std::uint32_t padded_here = 0;
    for (std::int64_t slot = 0; slot < k; ++slot) padded_here += ids[slot * slot_stride] == -1;
    tokens += padded_here < k;
    padded += padded_here;
  }
  histogram[num_experts + 1] = histogram[num_experts] - padded;
  histogram[num_experts] = padded;
  return tokens;
}

// Adds a routing map [rows, num_experts] of bytes (non-zero: routed) to
// histogram [num_experts]. Returns the assignments missing from rows that have
// fewer than top_k (0: unknown, none missing).
inline std::uint64_t count_byte_map(const std::uint8_t* map, std::int64_t rows,
                                    std::int64_t row_stride, std::int64_t expert_stride,
                                    std::uint32_t num_experts, std::uint32_t top_k,
                                    std::uint32_t* histogram) {
  // Tiles whose counts fit a byte: sixteen experts an instruction instead of
  // four.
  constexpr std::int64_t kRows = 255;
  constexpr std::uint32_t kExperts = 512;
  std::uint64_t missing = 0;
  for (std::int64_t first_row = 0; first_row < rows; first_row += kRows) {
    const std::int64_t tile_rows = std::min(kRows, rows - first_row);
    std::uint32_t routed[kRows] = {};
    for (std::uint32_t first = 0; first < num_experts; first += kExperts) {
      const std::uint32_t width = std::min(kExperts, num_experts - first);
      std::uint8_t counts[kExperts] = {};
      const std::uint8_t* tile = map + first_row * row_stride + first * expert_stride;
      for (std::int64_t row = 0; row < tile_rows; ++row, tile += row_stride) {
        std::uint32_t here = 0;
        if (expert_stride == 1) {
          for (std::uint32_t e = 0; e < width; ++e) {
            const std::uint8_t bit = tile[e] != 0;
            counts[e] = static_cast<std::uint8_t>(counts[e] + bit);
            here += bit;
          }
        } else {
          for (std::uint32_t e = 0; e < width; ++e) {
            const std::uint8_t bit = tile[e * expert_stride] != 0;
            counts[e] = static_cast<std::uint8_t>(counts[e] + bit);
            here += bit;
          }
        }
        routed[row] += here;
      }
      for (std::uint32_t e = 0; e < width; ++e) histogram[first + e] += counts[e];
    }
    for (std::int64_t row = 0; row < tile_rows; ++row) {
      if (routed[row] < top_k) missing += top_k - routed[row];
    }
  }
  return missing;
}

// Bytes [first, first + 8) of a row that has num_bytes, as one little-endian
// word; zero beyond.
inline std::uint64_t load_bits(const std::uint8_t* row, std::uint32_t first,
                               std::uint32_t num_bytes, std::int64_t byte_stride) {
  std::uint64_t word = 0;
  if (byte_stride == 1 && first + 8 <= num_bytes) {
    std::memcpy(&word, row + first, 8);
    return word;
  }
  for (std::uint32_t b = first; b < std::min(first + 8, num_bytes); ++b) {
    word |= std::uint64_t{row[b * byte_stride]} << (b - first) * 8;
  }
  return word;
}

// The same for bit-packed maps [rows, ceil(num_experts / 8)], bit e % 8 of byte
// e / 8. Bits past the last expert are added to *invalid.
inline std::uint64_t count_bit_map(const std::uint8_t* map, std::int64_t rows,
                                   std::int64_t row_stride, std::int64_t byte_stride,
                                   std::uint32_t num_experts, std::uint32_t top_k,
                                   std::uint32_t* histogram, std::uint64_t* invalid) {
  const std::uint32_t num_bytes = (num_experts + 7) / 8;
  std::uint64_t missing = 0, beyond = 0;
  for (std::int64_t row = 0; row < rows; ++row, map += row_stride) {
    std::uint32_t routed = 0;
    for (std::uint32_t first = 0; first < num_bytes; first += 8) {
      std::uint64_t bits = load_bits(map, first, num_bytes, byte_stride);
      for (; bits != 0; bits &= bits - 1) {
        const std::uint32_t expert = first * 8 + static_cast<std::uint32_t>(__builtin_ctzll(bits));
        const bool is_valid = expert < num_experts;
        beyond += !is_valid;
        routed += is_valid;
        if (is_valid) ++histogram[expert];
      }
    }
    if (routed < top_k) missing += top_k - routed;
  }
  *invalid += beyond;
  return missing;
}

// Statistics of counts [num_experts]. `scratch` holds kScratchPerExpert *
// num_experts words; its content is overwritten.
//
// sum_{i<j} |c_i - c_j| = sum over v of F(v) (E - F(v)), F(v) = experts with at
// most v tokens: linear in the largest count. Where that count is far above E,
// sorting is cheaper.
constexpr std::uint32_t kScratchPerExpert = 4;

inline PassStatistics pass_statistics(const std::uint32_t* counts, std::uint32_t num_experts,
                                      std::uint32_t* scratch) {
  PassStatistics s;
  std::uint32_t total = 0;  // fits: a pass has less than 2^32 assignments
  std::uint32_t max_count = 0;
  for (std::uint32_t e = 0; e < num_experts; ++e) {
    total += counts[e];
    max_count = std::max(max_count, counts[e]);
  }
  s.assignments = total;
  s.max_count = max_count;
  if (s.max_count < num_experts) {
    // Four histograms side by side: most counts are alike, and one bin would be
    // a chain of dependent additions.
    std::memset(scratch, 0, (std::size_t{s.max_count} + 1) * 4 * sizeof(std::uint32_t));
    std::uint32_t e = 0;
    for (; e + 4 <= num_experts; e += 4) {
      ++scratch[std::size_t{counts[e]} * 4];
      ++scratch[std::size_t{counts[e + 1]} * 4 + 1];
      ++scratch[std::size_t{counts[e + 2]} * 4 + 2];
      ++scratch[std::size_t{counts[e + 3]} * 4 + 3];
    }
    for (; e < num_experts; ++e) ++scratch[std::size_t{counts[e]} * 4];
    std::uint64_t at_most = 0;
    for (std::uint32_t v = 0; v < s.max_count; ++v) {
      const std::uint32_t* bins = scratch + std::size_t{v} * 4;
      at_most += (bins[0] + bins[1]) + (bins[2] + bins[3]);
      if (v == 0) s.unused_experts = static_cast<std::uint32_t>(at_most);
      s.gini_numerator += at_most * (num_experts - at_most);
    }
    if (s.max_count == 0) s.unused_experts = num_experts;
  } else {
    std::copy(counts, counts + num_experts, scratch);
    std::sort(scratch, scratch + num_experts);
    // The i-th smallest is subtracted from by i experts and subtracted in E - 1
    // - i pairs.
    std::int64_t sum = 0;
    for (std::uint32_t i = 0; i < num_experts; ++i) {
      s.unused_experts += scratch[i] == 0;
      sum += (2 * std::int64_t{i} - std::int64_t{num_experts} + 1) * std::int64_t{scratch[i]};
    }
    s.gini_numerator = static_cast<std::uint64_t>(sum);
  }
  return s;
}

}  // namespace dodoco

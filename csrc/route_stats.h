// Router output -> tokens per expert -> integer statistics. Includes neither torch nor Python.
//
// The statistics are numerators: readers divide, so that every backend stores the same bytes.
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

// Adds ids [rows, k] to histogram [num_experts + 2], whose last two bins take padding and invalid
// ids. Strides in elements. Returns the rows that are not all padding.
template <typename Id>
std::uint64_t count_ids(const Id* ids, std::int64_t rows, std::int64_t k, std::int64_t row_stride,
                        std::int64_t slot_stride, std::uint32_t num_experts,
                        std::uint32_t* histogram) {
  std::uint64_t tokens = 0;
  for (std::int64_t row = 0; row < rows; ++row, ids += row_stride) {
    bool any = false;
    for (std::int64_t slot = 0; slot < k; ++slot) {
      // Checked before narrowing: 2^32 + 3 is not expert 3.
      const std::int64_t id = ids[slot * slot_stride];
      const bool is_padding = id == -1;
      const bool is_valid = static_cast<std::uint64_t>(id) < num_experts;
      any |= !is_padding;
      const std::uint32_t bin = is_valid     ? static_cast<std::uint32_t>(id)
                                : is_padding ? num_experts
                                             : num_experts + 1;
      ++histogram[bin];
    }
    tokens += any;
  }
  return tokens;
}

// Adds a routing map [rows, num_experts] of bytes (non-zero: routed) to histogram [num_experts].
// Returns the assignments missing from rows that have fewer than top_k (0: unknown, none missing).
inline std::uint64_t count_byte_map(const std::uint8_t* map, std::int64_t rows,
                                    std::int64_t row_stride, std::int64_t expert_stride,
                                    std::uint32_t num_experts, std::uint32_t top_k,
                                    std::uint32_t* histogram) {
  std::uint64_t missing = 0;
  for (std::int64_t row = 0; row < rows; ++row, map += row_stride) {
    std::uint32_t routed = 0;
    if (expert_stride == 1) {
      for (std::uint32_t e = 0; e < num_experts; ++e) {
        const std::uint32_t bit = map[e] != 0;
        histogram[e] += bit;
        routed += bit;
      }
    } else {
      for (std::uint32_t e = 0; e < num_experts; ++e) {
        const std::uint32_t bit = map[e * expert_stride] != 0;
        histogram[e] += bit;
        routed += bit;
      }
    }
    if (routed < top_k) missing += top_k - routed;
  }
  return missing;
}

// The same for bit-packed maps [rows, ceil(num_experts / 8)], bit e % 8 of byte e / 8.
// Bits past the last expert are added to *invalid.
inline std::uint64_t count_bit_map(const std::uint8_t* map, std::int64_t rows,
                                   std::int64_t row_stride, std::int64_t byte_stride,
                                   std::uint32_t num_experts, std::uint32_t top_k,
                                   std::uint32_t* histogram, std::uint64_t* invalid) {
  const std::uint32_t num_bytes = (num_experts + 7) / 8;
  std::uint64_t missing = 0;
  for (std::int64_t row = 0; row < rows; ++row, map += row_stride) {
    std::uint32_t routed = 0;
    for (std::uint32_t b = 0; b < num_bytes; ++b) {
      for (std::uint32_t bits = map[b * byte_stride]; bits != 0; bits &= bits - 1) {
        const std::uint32_t expert = b * 8 + static_cast<std::uint32_t>(__builtin_ctz(bits));
        if (expert < num_experts) {
          ++histogram[expert];
          ++routed;
        } else {
          ++*invalid;
        }
      }
    }
    if (routed < top_k) missing += top_k - routed;
  }
  return missing;
}

// Statistics of counts [num_experts]. `scratch` holds kScratchPerExpert * num_experts words; its
// content is overwritten.
//
// sum_{i<j} |c_i - c_j| = sum over v of F(v) (E - F(v)), F(v) = experts with at most v tokens:
// linear in the largest count. Where that count is far above E, sorting is cheaper.
constexpr std::uint32_t kScratchPerExpert = 4;

inline PassStatistics pass_statistics(const std::uint32_t* counts, std::uint32_t num_experts,
                                      std::uint32_t* scratch) {
  PassStatistics s;
  std::uint64_t total = 0;
  for (std::uint32_t e = 0; e < num_experts; ++e) {
    total += counts[e];
    s.max_count = std::max(s.max_count, counts[e]);
    s.unused_experts += counts[e] == 0;
  }
  s.assignments = static_cast<std::uint32_t>(total);
  if (s.max_count < kScratchPerExpert * num_experts) {
    std::memset(scratch, 0, (std::size_t{s.max_count} + 1) * sizeof(std::uint32_t));
    for (std::uint32_t e = 0; e < num_experts; ++e) ++scratch[counts[e]];
    std::uint64_t at_most = 0;
    for (std::uint32_t v = 0; v < s.max_count; ++v) {
      at_most += scratch[v];
      s.gini_numerator += at_most * (num_experts - at_most);
    }
  } else {
    std::copy(counts, counts + num_experts, scratch);
    std::sort(scratch, scratch + num_experts);
    // The i-th smallest is subtracted from by i experts and subtracted in E - 1 - i pairs.
    std::int64_t sum = 0;
    for (std::uint32_t i = 0; i < num_experts; ++i) {
      sum += (2 * std::int64_t{i} - std::int64_t{num_experts} + 1) * std::int64_t{scratch[i]};
    }
    s.gini_numerator = static_cast<std::uint64_t>(sum);
  }
  return s;
}

}  // namespace dodoco

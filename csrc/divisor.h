// What tells the multiples of a number without a division.
#pragma once

#include <cstdint>

#include "format.h"

namespace dodoco {

// The multiples of `every`, at least 1: see ControlBlock.
struct Divisor {
  std::uint64_t mask, inverse, limit;

  explicit Divisor(std::uint64_t every) {
    const int twos = __builtin_ctzll(every);
    const std::uint64_t odd = every >> twos;
    mask = (std::uint64_t{1} << twos) - 1;
    inverse = odd;  // right in the lowest three bits; each step doubles them
    for (int bits = 3; bits < 64; bits *= 2) inverse *= 2 - odd * inverse;
    limit = UINT64_MAX / odd;
  }
};

inline void set_record_every(ControlBlock* control, std::uint32_t every) {
  const Divisor divisor(every > 1 ? every : 1);
  control->record_every = every;
  control->every_mask = divisor.mask;
  control->every_inverse = divisor.inverse;
  control->every_limit = divisor.limit;
}

}  // namespace dodoco

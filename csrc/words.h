// Access to shared 8-byte words. Readers are other threads and other processes: every access is a
// whole aligned word, and order between words is never relied upon (the format does not need it).
#pragma once

#include <cstdint>

namespace dodoco {

inline std::uint64_t load_word(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

inline void store_word(std::uint64_t* word, std::uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

// Only the owner of a word may add to it: a load and a store, not an atomic read-modify-write.
inline void add_to_own_word(std::uint64_t* word, std::uint64_t amount) {
  store_word(word, load_word(word) + amount);
}

}  // namespace dodoco

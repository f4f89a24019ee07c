// Access to shared 8-byte words. Readers are other threads and other processes: every access is a
// whole aligned word. Order between words is relied upon only where one is published: whoever loads
// it by load_published() sees what was stored before publish_word().
#pragma once

#include <cstdint>

namespace dodoco {

inline std::uint64_t load_word(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

inline void store_word(std::uint64_t* word, std::uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

inline void publish_word(std::uint64_t* word, std::uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

// A copy of a word will do, as one that pread() made: the order follows from what it was copied of.
inline std::uint64_t load_published(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

// Only the owner of a word may add to it: a load and a store, not an atomic read-modify-write.
inline void add_to_own_word(std::uint64_t* word, std::uint64_t amount) {
  store_word(word, load_word(word) + amount);
}

}  // namespace dodoco

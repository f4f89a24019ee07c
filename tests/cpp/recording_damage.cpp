// Damages a recording in 10,000 and more ways: each is read, or refused with a RecordingError.
//   recording_damage FOLDER [SEED] [RANDOM]
// A crash, a hang or a report of a sanitizer is a failure; the seed and the last step are printed.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "hostile.h"
#include "lane.h"
#include "recording_writer.h"

using namespace dodoco;

namespace {

using Bytes = std::vector<std::uint8_t>;

// Two lanes, three layers, rings that have lapped: a few passes of every kind.
Bytes whole_recording(const std::string& path) {
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = R"({"layers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]})";
  spec.layers = {{4, 2}, {8, 0}, {9, 9}};
  spec.num_lanes = 2;
  spec.max_bytes = 116 << 10;
  spec.group_size = 5;
  spec.num_slots = 12;
  spec.kept_placements = 3;
  RecordingWriter writer(spec);
  const std::int64_t ids[6] = {0, 1, 2, -1, 3, 99};
  Transfer transfer{};
  transfer.sent = transfer.received = {ids, 0, 5, 1};
  transfer.iteration = -1;
  for (std::uint64_t n = 0; n < 3 * writer.num_slots(); ++n) {
    writer.lane(n % 2)->record(n % 3, IdTensor{ids, IdType::kInt64, 3, 2, 2, 1}, n % 7 == 0);
    transfer.type = 2 + n % 2;
    transfer.layer = n % 3;
    transfer.experts = {ids, 1, static_cast<std::uint32_t>(n % 6), 1};
    if (n % 3 == 0) writer.lane(n % 2)->record(transfer, nullptr);
    if (n < 20) writer.record_placement({{0, 2, {0, 1, 2, 1u << 16 | 3}}, {2, 2, {8, kEmptySlot}}});
  }
  writer.close();
  Bytes bytes(writer.file_bytes());
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (::read(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::exit(2);
  ::close(fd);
  ::unlink(path.c_str());
  return bytes;
}

// One file, changed in place and put right again: thousands of damages a second.
class Victim {
 public:
  Victim(std::string path, Bytes whole)
      : path_(std::move(path)),
        whole_(std::move(whole)),
        fd_(::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)) {
    put(0, whole_.data(), whole_.size());
  }
  ~Victim() {
    ::close(fd_);
    ::unlink(path_.c_str());
  }
  Victim(const Victim&) = delete;
  Victim& operator=(const Victim&) = delete;

  std::uint64_t read = 0, refused = 0;
  std::size_t slowest_ms = 0;

  const Bytes& whole() const { return whole_; }

  void damage(std::size_t offset, const void* data, std::size_t bytes) {
    bytes = std::min(bytes, whole_.size() - offset);
    put(offset, data, bytes);
    touched_.push_back({offset, bytes});
  }

  void resize(std::size_t bytes) {
    if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) std::abort();
    resized_ = true;
  }

  void look() {
    // A reader treats a slot that is not whole in another way while the owner lives.
    ::flock(fd_, (read + refused) % 2 != 0 ? LOCK_EX : LOCK_UN);
    const auto start = std::chrono::steady_clock::now();
    ++(hostile::read_everything(path_) ? read : refused);
    const auto took = std::chrono::steady_clock::now() - start;
    slowest_ms = std::max<std::size_t>(
        slowest_ms, static_cast<std::size_t>(took / std::chrono::milliseconds(1)));
    if (resized_) {
      if (::ftruncate(fd_, 0) != 0) std::abort();
      put(0, whole_.data(), whole_.size());
    } else {
      for (const auto& [offset, bytes] : touched_) put(offset, whole_.data() + offset, bytes);
    }
    touched_.clear();
    resized_ = false;
  }

 private:
  void put(std::size_t offset, const void* data, std::size_t bytes) {
    if (::pwrite(fd_, data, bytes, static_cast<off_t>(offset)) != static_cast<ssize_t>(bytes))
      std::abort();
  }

  std::string path_;
  Bytes whole_;
  int fd_;
  std::vector<std::pair<std::size_t, std::size_t>> touched_;
  bool resized_ = false;
};

struct Field {
  std::size_t offset, bytes;
};

FileHeader header_of(const Bytes& whole) {
  FileHeader header;
  std::memcpy(&header, whole.data(), sizeof(header));
  return header;
}

// Every field of the header, of the sections in use and one more, of the layer table; heads, and
// the first and the last words of boards and rings.
std::vector<Field> fields_of(const Bytes& whole) {
  const FileHeader header = header_of(whole);
  std::vector<Field> fields;
  for (std::size_t at = 0; at < offsetof(FileHeader, uuid); at += 4) fields.push_back({at, 4});
  for (std::size_t at = 0; at < offsetof(FileHeader, uuid); at += 8) fields.push_back({at, 8});
  for (std::uint32_t i = 0; i <= header.num_sections; ++i) {
    const std::size_t entry = offsetof(FileHeader, sections) + i * sizeof(Section);
    fields.push_back({entry, 4});
    fields.push_back({entry + 4, 4});
    for (std::size_t at = 8; at < sizeof(Section); at += 8) fields.push_back({entry + at, 8});
    const Section& section = header.sections[i];
    if (section.kind == static_cast<std::uint32_t>(SectionKind::kLayers)) {
      for (std::size_t at = 0; at < section.bytes; at += 4)
        fields.push_back({section.offset + at, 4});
      for (std::size_t at = 0; at < section.bytes; at += 8)
        fields.push_back({section.offset + at, 8});
    } else if (section.bytes >= 256) {
      for (std::size_t at = 0; at < 256; at += 8) fields.push_back({section.offset + at, 8});
      fields.push_back({section.offset + section.bytes - 8, 8});
    }
  }
  return fields;
}

std::vector<std::uint64_t> values_for(const Bytes& whole, const Field& field) {
  std::uint64_t now = 0;
  std::memcpy(&now, whole.data() + field.offset, field.bytes);
  std::vector<std::uint64_t> values = {0,
                                       1,
                                       2,
                                       3,
                                       4,
                                       7,
                                       16,
                                       17,
                                       63,
                                       64,
                                       65,
                                       4095,
                                       4096,
                                       65535,
                                       65536,
                                       65537,
                                       whole.size(),
                                       whole.size() - 1,
                                       whole.size() - 64,
                                       whole.size() / 64 * 64,
                                       now - 1,
                                       now + 1,
                                       now - 8,
                                       now + 8,
                                       now - 64,
                                       now + 64,
                                       now * 2,
                                       now / 2,
                                       ~now,
                                       ~std::uint64_t{0}};
  for (int bit = 5; bit < 64; bit += 3) {
    values.push_back(std::uint64_t{1} << bit);
    values.push_back((std::uint64_t{1} << bit) - 1);
    values.push_back(~((std::uint64_t{1} << bit) - 1));
  }
  return values;
}

void structured(Victim* victim) {
  const Bytes& whole = victim->whole();
  const std::vector<Field> fields = fields_of(whole);
  for (const Field& field : fields) {
    for (const std::uint64_t value : values_for(whole, field)) {
      victim->damage(field.offset, &value, field.bytes);
      victim->look();
    }
  }
}

void truncated(Victim* victim) {
  const FileHeader header = header_of(victim->whole());
  std::vector<std::size_t> sizes = {0, 1, 7, 8, 9, 24, 27, 28, 88, 247, 248, 4095, 4096, 4097};
  for (std::uint32_t i = 0; i < header.num_sections; ++i) {
    const Section& section = header.sections[i];
    for (const std::int64_t by : {-65, -1, 0, 1, 64, 127, 128, 129}) {
      sizes.push_back(static_cast<std::size_t>(static_cast<std::int64_t>(section.offset) + by));
      sizes.push_back(
          static_cast<std::size_t>(static_cast<std::int64_t>(section.offset + section.bytes) + by));
    }
  }
  for (const std::size_t size : sizes) {
    for (const bool honest : {false, true}) {
      victim->resize(size);
      const std::uint64_t bytes = size;
      if (honest && size >= sizeof(FileHeader))  // the header agrees with the size
        victim->damage(offsetof(FileHeader, file_bytes), &bytes, 8);
      victim->look();
    }
  }
}

void swapped(Victim* victim) {
  const FileHeader header = header_of(victim->whole());
  for (std::uint32_t a = 0; a < header.num_sections; ++a) {
    for (std::uint32_t b = 0; b < header.num_sections; ++b) {
      const std::size_t entry = offsetof(FileHeader, sections) + a * sizeof(Section);
      const std::size_t other = offsetof(FileHeader, sections) + b * sizeof(Section);
      // Whole entries, and one's place with the other's kind.
      victim->damage(entry, &header.sections[b], sizeof(Section));
      victim->look();
      victim->damage(entry, &header.sections[b], sizeof(Section));
      victim->damage(other, &header.sections[a], sizeof(Section));
      victim->look();
      victim->damage(entry + 8, &header.sections[b].offset, 16);
      victim->look();
      victim->damage(entry + 24, &header.sections[b].count, 16);
      victim->look();
    }
  }
}

void random_damage(Victim* victim, std::uint64_t seed, int times) {
  std::mt19937_64 random(seed);
  const Bytes& whole = victim->whole();
  const std::vector<Field> fields = fields_of(whole);
  for (int n = 0; n < times; ++n) {
    for (std::uint64_t changes = 1 + random() % 4; changes > 0; --changes) {
      const Field& field = fields[random() % fields.size()];
      const std::vector<std::uint64_t> values = values_for(whole, field);
      const std::uint64_t any = random(), value = values[random() % values.size()];
      switch (random() % 4) {
        case 0:  // any byte
          victim->damage(random() % whole.size(), &any, 1);
          break;
        case 1: {  // a bit of the header, the layer table or a head
          const auto bit = static_cast<std::uint8_t>(whole[field.offset] ^ 1u << any % 8);
          victim->damage(field.offset, &bit, 1);
          break;
        }
        case 2:
          victim->damage(field.offset, &value, field.bytes);
          break;
        default:  // a stretch of another part of the file
          victim->damage(random() % whole.size(), whole.data() + any % (whole.size() - 512),
                         random() % 512);
      }
    }
    if (n % 16 == 0) victim->resize(random() % (whole.size() + 4096));
    victim->look();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: recording_damage FOLDER [SEED] [RANDOM]\n");
    return 2;
  }
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20261124;
  const int times = argc > 3 ? std::atoi(argv[3]) : 20000;
  const std::string path =
      std::string(argv[1]) + "/damage-" + std::to_string(::getpid()) + ".dodoco";
  Victim victim(path, whole_recording(path));
  victim.look();
  if (victim.read != 1) return 1;
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t before = 1;
  const auto report = [&](const std::string& what) {
    const std::uint64_t done = victim.read + victim.refused;
    std::printf("ok: %s: %llu damages\n", what.c_str(),
                static_cast<unsigned long long>(done - before));
    std::fflush(stdout);
    before = done;
  };
  structured(&victim);
  report("every field, extreme values");
  truncated(&victim);
  report("truncated");
  swapped(&victim);
  report("sections swapped");
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  random_damage(&victim, seed, times);
  report("random");
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::uint64_t all = victim.read + victim.refused - 1;
  const bool enough = all >= 10000 && victim.read > 1 && victim.refused > 0;
  std::printf("%s: %llu damages in %.1f s: %llu readable, %llu refused, slowest %zu ms\n",
              enough ? "ok" : "FAILED", static_cast<unsigned long long>(all), seconds,
              static_cast<unsigned long long>(victim.read - 1),
              static_cast<unsigned long long>(victim.refused), victim.slowest_ms);
  return enough ? 0 : 1;
}

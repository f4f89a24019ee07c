#include "device_lanes.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

namespace dodoco {
namespace {

// Open lanes, so that an op finds those of a site without trusting what it holds. A slot is written
// by whoever opens or closes lanes and read by launches, which never wait.
constexpr std::size_t kMaxOpen = 64;
std::atomic<DeviceLanes*> g_open[kMaxOpen];
std::atomic<std::size_t> g_num_open{0};  // slots ever used

// Files registered with the driver: how many devices' lanes write to each.
struct Registry {
  std::mutex mutex;
  std::map<const void*, int> users;
  std::vector<const DeviceLanes*> made;  // all there ever were: they are never destroyed
};

Registry& registry() {
  static Registry* made = [] {
    auto* result = new Registry;
    // A child of fork() has no driver: nothing there may launch, nor wait for a lock held here.
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     for (auto& slot : g_open) slot.store(nullptr, std::memory_order_relaxed);
                     registry().mutex.unlock();
                   });
    return result;
  }();
  return *made;
}

constexpr std::uint64_t aligned(std::uint64_t bytes, std::uint64_t to = 256) {
  return (bytes + to - 1) / to * to;
}

// What tells multiples of `every`: see ControlBlock.
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

}  // namespace

DeviceLanes* DeviceLanes::of_site(std::uint64_t address) {
  const std::size_t count = g_num_open.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < count; ++i) {
    DeviceLanes* lanes = g_open[i].load(std::memory_order_acquire);
    if (lanes == nullptr) continue;
    const std::uint64_t first = lanes->site_address(0);
    if (address - first < lanes->layers_.size() * sizeof(Site)) return lanes;
  }
  return nullptr;
}

DeviceLanes::DeviceLanes(RecordingWriter* writer, int device, std::uint32_t first_lane,
                         std::uint32_t num_lanes)
    : writer_(writer),
      device_(device),
      first_lane_(first_lane),
      context_(std::make_unique<cuda::PrimaryContext>(device)),
      driver_(cuda::driver()),
      owner_pid_(::getpid()),
      file_base_(writer->base()) {
  if (file_base_ == nullptr) throw std::invalid_argument("the recording is closed");
  if (num_lanes < 1 || first_lane + num_lanes > writer->num_lanes()) {
    throw std::invalid_argument("lanes " + std::to_string(first_lane) + " to " +
                                std::to_string(first_lane + num_lanes) + " of a recording with " +
                                std::to_string(writer->num_lanes()));
  }
  int count = 0;
  cuda::check(driver_.device_get_count(&count), "cuDeviceGetCount");
  only_device_ = count == 1;
  for (const LayerEntry& entry : writer->layers())
    layers_.push_back({entry.num_experts, entry.top_k, entry.board_offset, false, {}});
  for (std::uint32_t lane = 0; lane < num_lanes; ++lane)
    boards_.push_back(writer->section(SectionKind::kBoard, first_lane + lane).offset);
  settings_.assign(num_lanes, {1, 1, 0, 0, -1});
  owners_.assign(num_lanes, std::nullopt);
  reserved_.assign(num_lanes, false);
  lay_out();

  Registry& files = registry();
  const std::lock_guard<std::mutex> guard(files.mutex);
  const cuda::Current current(context_->get());
  try {
    if (files.users.count(file_base_) == 0) {
      cuda::check(driver_.host_register(file_base_, writer->file_bytes(),
                                        cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap),
                  "cuMemHostRegister");
    }
    ++files.users[file_base_];
    registered_ = true;
    // Asked for on each device: nothing says that the address is the same on all.
    cuda::check(driver_.host_device_pointer(&file_, file_base_, 0), "cuMemHostGetDevicePointer");
    cuda::check(driver_.alloc(&arena_, at_.bytes), "cuMemAlloc");
    fill_arena();
    const std::size_t slots = g_num_open.load(std::memory_order_relaxed);
    std::size_t slot = 0;
    while (slot < slots && g_open[slot].load(std::memory_order_relaxed) != nullptr) ++slot;
    if (slot == kMaxOpen) throw std::invalid_argument("64 recordings on devices are open: detach");
    files.made.push_back(this);
    writer->hold();
    open_.store(true, std::memory_order_relaxed);
    g_open[slot].store(this, std::memory_order_release);
    g_num_open.store(std::max(slots, slot + 1), std::memory_order_release);
  } catch (...) {
    release();
    throw;
  }
}

void DeviceLanes::lay_out() {
  const std::uint64_t lanes = settings_.size();
  std::uint64_t widest = 1;
  for (const Layer& layer : layers_) {
    std::uint64_t padded = 1;
    while (padded < layer.num_experts) padded *= 2;
    widest = std::max(widest, padded);
  }
  at_.board_bytes = writer_->section(SectionKind::kBoard, first_lane_).bytes;
  at_.scratch_bytes = aligned((kScratchCounts + widest) * 4);
  std::uint64_t next = 0;
  const auto take = [&](std::uint64_t bytes) {
    const std::uint64_t at = next;
    next += aligned(bytes);
    return at;
  };
  at_.lanes = take(lanes * sizeof(DeviceLane));
  at_.sites = take(layers_.size() * sizeof(Site));
  at_.zeroed = next;  // what comes before is copied, what follows cleared
  at_.clock = take(8);
  at_.scratch = take(lanes * at_.scratch_bytes);
  at_.totals = take(lanes * at_.board_bytes);
  at_.bytes = next;
}

void DeviceLanes::fill_arena() {
  std::vector<std::uint8_t> image(at_.zeroed, 0);
  const Divisor every(1);
  for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
    const Section& ring = writer_->section(SectionKind::kRing, first_lane_ + lane);
    DeviceLane block{};
    ControlBlock& control = block.control;
    control.magic = kControlMagic;
    control.recording = file_;
    control.enabled = 1;
    control.record_every = 1;
    control.num_valid = -1;
    control.ring = file_ + ring.offset;
    control.log2_slots = static_cast<std::uint64_t>(__builtin_ctzll(ring.count));
    control.scratch = arena_ + at_.scratch + lane * at_.scratch_bytes;
    control.every_mask = every.mask;
    control.every_inverse = every.inverse;
    control.every_limit = every.limit;
    block.state.last_layer = -1;
    std::copy(std::begin(kMaxMeanEighths), std::end(kMaxMeanEighths), block.max_mean_eighths);
    std::memcpy(image.data() + at_.lanes + lane * sizeof(block), &block, sizeof(block));
  }
  for (std::uint64_t layer = 0; layer < layers_.size(); ++layer) {
    const Site site{kSiteMagic, site_address(layer), lane_address(0), layer, {}};
    std::memcpy(image.data() + at_.sites + layer * sizeof(site), &site, sizeof(site));
  }
  cuda::check(driver_.memset_bytes(arena_ + at_.zeroed, 0, at_.bytes - at_.zeroed), "cuMemsetD8");
  cuda::check(driver_.copy_to_device(arena_, image.data(), image.size()), "cuMemcpyHtoD");
}

std::size_t DeviceLanes::slot_of(ChoiceForm form, int id_bytes) {
  if (form == ChoiceForm::kByteMap) return 3;
  if (form == ChoiceForm::kBitMap) return 4;
  return id_bytes == 8 ? 2 : id_bytes == 4 ? 1 : 0;
}

void DeviceLanes::add_kernel(const KernelSpec& spec) {
  const cuda::Current current(context_->get());
  cuda::Module module = nullptr;
  cuda::check(driver_.module_load(&module, spec.code.data()), "cuModuleLoadData");
  modules_.push_back(module);
  auto kernel = std::make_unique<Kernel>();
  cuda::check(driver_.module_function(&kernel->function, module, spec.name.c_str()),
              "cuModuleGetFunction");
  if (spec.shared_bytes > 48 * 1024) {
    cuda::check(driver_.function_set(kernel->function, cuda::kMaxDynamicSharedBytes,
                                     static_cast<int>(spec.shared_bytes)),
                "cuFuncSetAttribute");
  }
  kernel->block_k = spec.block_k;
  kernel->threads = spec.num_warps * 32;
  kernel->shared_bytes = spec.shared_bytes;
  kernel->max_programs = spec.max_programs;
  kernel->rows_per_program = std::max<std::int64_t>(spec.rows_per_program, 1);
  kernel->max_rows = spec.max_rows;
  for (Layer& layer : layers_) {
    if (layer.num_experts != spec.num_experts) continue;
    const Kernel*& place = layer.kernels[slot_of(spec.form, spec.id_bytes)][spec.shared ? 1 : 0];
    // Of several that fit, the one with the fewest columns to spare.
    const bool fits = spec.form != ChoiceForm::kIds || spec.block_k >= layer.top_k;
    if (fits && (place == nullptr || spec.block_k < place->block_k)) place = kernel.get();
  }
  kernels_.push_back(std::move(kernel));
}

void DeviceLanes::calibrate_clock(const std::string& name, const std::string& code) {
  constexpr int kTries = 10;  // the first ones warm up
  const cuda::Current current(context_->get());
  cuda::Module module = nullptr;
  cuda::check(driver_.module_load(&module, code.data()), "cuModuleLoadData");
  modules_.push_back(module);
  cuda::Function function = nullptr;
  cuda::check(driver_.module_function(&function, module, name.c_str()), "cuModuleGetFunction");
  cuda::Stream stream = nullptr;
  cuda::check(driver_.stream_create(&stream, cuda::kStreamNonBlocking), "cuStreamCreate");
  const cuda::Address out = arena_ + at_.clock;
  std::uint64_t shortest = UINT64_MAX;
  std::int64_t offset = 0;
  const auto measure = [&] {
    cuda::Address argument = out;
    cuda::Address unused[2] = {0, 0};
    void* params[] = {&argument, &unused[0], &unused[1]};
    const std::uint64_t before = monotonic_ns();
    cuda::check(driver_.launch(function, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr),
                "cuLaunchKernel");
    cuda::check(driver_.stream_synchronize(stream), "cuStreamSynchronize");
    const std::uint64_t after = monotonic_ns();
    std::uint64_t clock = 0;
    cuda::check(driver_.copy_to_host(&clock, out, sizeof(clock)), "cuMemcpyDtoH");
    if (after - before >= shortest) return;
    shortest = after - before;
    offset = static_cast<std::int64_t>(before + (after - before) / 2 - clock);
  };
  try {
    for (int i = 0; i < kTries; ++i) measure();
  } catch (...) {
    driver_.stream_destroy(stream);
    throw;
  }
  cuda::check(driver_.stream_destroy(stream), "cuStreamDestroy");
  for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
    cuda::check(driver_.copy_to_device(lane_address(lane) + offsetof(ControlBlock, clock_offset_ns),
                                       &offset, sizeof(offset)),
                "cuMemcpyHtoD");
  }
}

std::uint64_t DeviceLanes::site_address(std::uint64_t layer) const {
  if (layer >= layers_.size())
    throw std::invalid_argument("no layer " + std::to_string(layer) + " in this recording");
  return arena_ + at_.sites + layer * sizeof(Site);
}

void DeviceLanes::write_words(cuda::Address at, const std::uint32_t* words, std::size_t count,
                              cuda::Stream stream) {
  for (std::size_t i = 0; i < count; ++i) {
    cuda::check(driver_.memset_words_async(at + i * 4, words[i], 1, stream), "cuMemsetD32Async");
  }
}

void DeviceLanes::set(std::uint32_t lane, const std::string& name, std::int64_t value,
                      cuda::Stream stream) {
  if (closed()) return;
  LaneSettings& settings = settings_.at(lane);
  const cuda::Address control = lane_address(lane);
  const cuda::Current current(context_->get());
  int capturing = 0;
  const cuda::Result result = driver_.stream_is_capturing(stream, &capturing);
  if (capturing != 0 || result == cuda::kCaptureImplicit) {
    throw std::runtime_error(
        "the current stream is being captured, and the graph would set it at each replay: set it "
        "outside the capture");
  }
  cuda::check(result, "cuStreamIsCapturing");
  const auto word = static_cast<std::uint32_t>(value);
  const auto set_word = [&](std::size_t offset, std::uint32_t* mirror) {
    write_words(control + offset, &word, 1, stream);
    *mirror = word;
  };
  if (name == "enabled") {
    set_word(offsetof(ControlBlock, enabled), &settings.enabled);
  } else if (name == "map_version") {
    set_word(offsetof(ControlBlock, map_version), &settings.map_version);
  } else if (name == "microbatch") {
    set_word(offsetof(ControlBlock, microbatch), &settings.microbatch);
  } else if (name == "record_every") {
    if (word == 0) throw std::invalid_argument("record_every=0: give 1 or more");
    const Divisor every(word);
    std::uint32_t words[6];
    std::memcpy(words, &every, sizeof(words));
    write_words(control + offsetof(ControlBlock, every_mask), words, 6, stream);
    set_word(offsetof(ControlBlock, record_every), &settings.record_every);
  } else if (name == "num_valid") {
    std::uint32_t words[2];
    std::memcpy(words, &value, sizeof(words));
    write_words(control + offsetof(ControlBlock, num_valid), words, 2, stream);
    settings.num_valid = value;
  } else {
    throw std::invalid_argument("no setting '" + name + "' of a lane");
  }
}

std::int64_t DeviceLanes::get(std::uint32_t lane, const std::string& name) const {
  const LaneSettings& settings = settings_.at(lane);
  if (name == "enabled") return settings.enabled;
  if (name == "record_every") return settings.record_every;
  if (name == "num_valid") return settings.num_valid;
  if (name == "map_version") return settings.map_version;
  if (name == "microbatch") return settings.microbatch;
  throw std::invalid_argument("no setting '" + name + "' of a lane");
}

void DeviceLanes::switch_off(std::uint64_t site) {
  layers_.at((site - site_address(0)) / sizeof(Site)).is_off = true;
}

void* DeviceLanes::reserve(std::uint32_t lane) {
  if (lane >= num_lanes()) {
    throw std::invalid_argument("lane " + std::to_string(lane) + " of a device with " +
                                std::to_string(num_lanes()));
  }
  reserved_[lane] = true;
  return reinterpret_cast<void*>(std::uintptr_t{lane} + 1);  // lane 0 is no null pointer
}

// num_lanes() if there is none. A lane belongs to one stream for good: two that ran at once in one
// would lose counts.
std::uint32_t DeviceLanes::lane_of(cuda::Stream stream) {
  if (const void* chosen = LaneChoice::instead_of(this))
    return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(chosen) - 1);
  const std::uint32_t count = num_lanes();
  std::uint32_t vacant = count;
  for (std::uint32_t lane = count; lane-- > 0;) {
    if (owners_[lane] == stream) return lane;
    if (!owners_[lane].has_value() && !reserved_[lane]) vacant = lane;
  }
  if (vacant < count) owners_[vacant] = stream;
  return vacant;
}

RecordResult DeviceLanes::launch(std::uint64_t site, const DeviceTensor& tensor,
                                 cuda::Stream stream, bool recomputed) {
  const std::uint64_t number = (site - site_address(0)) / sizeof(Site);
  if (closed()) return RecordResult::kIgnored;
  if (number >= layers_.size()) return RecordResult::kBadSite;
  const Layer& layer = layers_[number];
  if (layer.is_off) return RecordResult::kIgnored;
  const auto& kernels = layer.kernels[slot_of(tensor.form, tensor.id_bytes)];
  const Kernel* kernel = kernels[0];
  if (kernel == nullptr) return RecordResult::kBadShape;
  const std::int64_t experts = layer.num_experts;
  const bool is_ids = tensor.form == ChoiceForm::kIds;
  const std::int64_t wanted = tensor.form == ChoiceForm::kBitMap ? (experts + 7) / 8 : experts;
  if (tensor.rows < 0 || tensor.columns < 0 ||
      (is_ids ? tensor.columns > kernel->block_k || tensor.columns > experts
              : tensor.columns != wanted)) {
    return RecordResult::kBadShape;
  }
  // A pass is counted in 32 bits.
  if (tensor.rows > INT32_MAX / std::max<std::int64_t>(is_ids ? tensor.columns : experts, 1))
    return RecordResult::kTooLarge;
  unsigned programs = 1;
  if (tensor.rows > kernel->max_rows && !recomputed && kernels[1] != nullptr) {
    kernel = kernels[1];
    const std::int64_t needed =
        (tensor.rows + kernel->rows_per_program - 1) / kernel->rows_per_program;
    programs = static_cast<unsigned>(std::min<std::int64_t>(needed, kernel->max_programs));
  }
  const std::uint32_t lane = lane_of(stream);
  if (lane >= num_lanes()) return RecordResult::kNoLane;
  // The default stream cannot be captured.
  if (!captured_ && stream != nullptr) {
    int capturing = 0;
    captured_ = driver_.stream_is_capturing(stream, &capturing) != cuda::kSuccess || capturing != 0;
  }

  // What differs by lane and layer is an argument, so that the kernel has to look nothing up; what
  // changes while a captured graph lives is in the lane's control block.
  auto data = reinterpret_cast<cuda::Address>(tensor.data);
  cuda::Address control = lane_address(lane);
  cuda::Address totals = arena_ + at_.totals + lane * at_.board_bytes + layer.board_offset;
  cuda::Address board = file_ + boards_[lane] + layer.board_offset;
  auto layer_number = static_cast<std::int32_t>(number);
  auto top_k = static_cast<std::int32_t>(layer.top_k);
  auto rows = static_cast<std::int32_t>(recomputed ? 0 : tensor.rows);  // seen, not counted
  auto columns = static_cast<std::int32_t>(tensor.columns);
  std::int64_t row_stride = tensor.row_stride, column_stride = tensor.column_stride;
  std::int32_t again = recomputed ? 1 : 0;
  cuda::Address unused[2] = {0, 0};  // Triton's own scratch, which the kernels do without
  void* params[] = {&data,    &control,    &totals,        &board, &layer_number, &top_k,    &rows,
                    &columns, &row_stride, &column_stride, &again, &unused[0],    &unused[1]};
  const auto start = [&] {
    return driver_.launch(kernel->function, programs, 1, 1, kernel->threads, 1, 1,
                          kernel->shared_bytes, stream, params, nullptr);
  };
  cuda::Result result;
  if (only_device_) {
    result = start();
  } else {
    // The caller may have another device current.
    cuda::Context popped = nullptr;
    result = driver_.push(context_->get());
    if (result == cuda::kSuccess) {
      result = start();
      driver_.pop(&popped);
    }
  }
  return result == cuda::kSuccess ? RecordResult::kRecorded : RecordResult::kDeviceError;
}

void DeviceLanes::close() {
  if (owner_pid_ != ::getpid()) return;
  Registry& files = registry();
  const std::lock_guard<std::mutex> guard(files.mutex);
  if (closed()) return;
  open_.store(false, std::memory_order_relaxed);
  for (auto& slot : g_open) {
    DeviceLanes* self = this;
    slot.compare_exchange_strong(self, nullptr);
  }
  try {
    const cuda::Current current(context_->get());
    // A graph that is replayed from now on finds no magic and returns.
    const std::uint64_t none = 0;
    for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
      cuda::check(driver_.copy_to_device(lane_address(lane), &none, sizeof(none)), "cuMemcpyHtoD");
    }
    cuda::check(driver_.synchronize(), "cuCtxSynchronize");
    if (captured_) return;
    release();
  } catch (const cuda::Error& error) {
    if (error.code() == cuda::kDeinitialized) return;  // nothing of the device is left
    // What was launched may still write, so nothing is taken from under it.
    throw;
  }
  context_.reset();
  writer_->release();
}

// Takes back what the constructor made, as far as it came; what cannot be taken back is left.
// The registry's lock is held and the context is the thread's.
void DeviceLanes::release() {
  for (cuda::Module module : modules_) driver_.module_unload(module);
  modules_.clear();
  if (arena_ != 0) driver_.free(arena_);  // its address stays: of_site() may be comparing with it
  if (!registered_) return;
  registered_ = false;
  auto& users = registry().users;
  const auto file = users.find(file_base_);
  if (--file->second == 0) {
    // What the driver still holds must stay mapped.
    if (driver_.host_unregister(file_base_) != cuda::kSuccess) writer_->hold();
    users.erase(file);
  }
}

}  // namespace dodoco

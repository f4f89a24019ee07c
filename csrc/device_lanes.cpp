#include "device_lanes.h"

#include <sched.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "device_registry.h"

namespace dodoco {

DeviceLanes::DeviceLanes(RecordingWriter* writer, int device, std::uint32_t first_lane,
                         std::uint32_t num_lanes)
    : writer_(writer),
      device_(device),
      num_lanes_(num_lanes),
      context_(std::make_unique<cuda::PrimaryContext>(device)),
      driver_(cuda::driver()),
      file_base_(writer->base()),
      layers_(writer->layers().size()),
      owners_(num_lanes),
      reserved_(num_lanes, false) {
  if (file_base_ == nullptr) throw std::invalid_argument("the recording is closed");
  if (num_lanes < 1 || first_lane + num_lanes > writer->num_lanes()) {
    throw std::invalid_argument("lanes " + std::to_string(first_lane) + " to " +
                                std::to_string(first_lane + num_lanes) + " of a recording with " +
                                std::to_string(writer->num_lanes()));
  }
  int count = 0;
  cuda::check(driver_.device_get_count(&count), "cuDeviceGetCount");
  only_device_ = count == 1;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const LayerEntry& entry = writer->layers()[i];
    layers_[i].num_experts = entry.num_experts;
    layers_[i].top_k = entry.top_k;
    layers_[i].board_offset = entry.board_offset;
  }
  for (std::uint32_t lane = 0; lane < num_lanes; ++lane)
    boards_.push_back(writer->section(SectionKind::kBoard, first_lane + lane).offset);
  for (std::uint32_t lane = 0; lane < num_lanes && writer->group_size() != 0; ++lane)
    traffic_.push_back(writer->section(SectionKind::kTraffic, first_lane + lane).offset);
  places_ = DeviceArena(*writer, first_lane, num_lanes);

  const cuda::Current current(context_->get());
  try {
    set_up();
    writer->hold();
    open_.store(true);
    device_registry::open(this);
  } catch (...) {
    if (open_.exchange(false)) writer->release();
    release();
    throw;
  }
}

void DeviceLanes::set_up() {
  {
    device_registry::File file(file_base_);
    if (!file.in_use()) {
      cuda::check(driver_.host_register(file_base_, writer_->file_bytes(),
                                        cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap),
                  "cuMemHostRegister");
    }
    file.add_user();
    registered_ = true;
  }
  // Asked for on each device: nothing says that the address is the same on all.
  cuda::check(driver_.host_device_pointer(&file_, file_base_, 0), "cuMemHostGetDevicePointer");
  cuda::check(driver_.alloc(&arena_, places_.bytes()), "cuMemAlloc");
  cuda::check(driver_.stream_create(&own_stream_, cuda::kStreamNonBlocking), "cuStreamCreate");
  const std::vector<std::uint8_t> image = places_.image(*writer_, arena_, file_);
  cuda::check(driver_.copy_to_device(arena_, image.data(), image.size(), own_stream_),
              "cuMemcpyHtoDAsync");
  const std::uint64_t zeroed = places_.zeroed();
  cuda::check(driver_.memset_words(arena_ + zeroed, 0, (places_.bytes() - zeroed) / 4, own_stream_),
              "cuMemsetD32Async");
  finish_own_stream();  // no other stream would wait for it
}

void DeviceLanes::finish_own_stream() {
  cuda::check(driver_.stream_synchronize(own_stream_), "cuStreamSynchronize");
}

std::size_t DeviceLanes::slot_of(ChoiceForm form, int id_bytes) {
  if (form == ChoiceForm::kByteMap) return 3;
  if (form == ChoiceForm::kBitMap) return 4;
  return id_bytes == 8 ? 2 : id_bytes == 4 ? 1 : 0;
}

cuda::Module DeviceLanes::load_module(const std::string& code) {
  cuda::Module module = nullptr;
  cuda::check(driver_.module_load(&module, code.data()), "cuModuleLoadData");
  modules_.push_back(module);
  return module;
}

// A function of a module, in the device's memory: none is loaded at its first launch.
cuda::Function DeviceLanes::load(cuda::Module module, const std::string& name) {
  cuda::Function function = nullptr;
  cuda::check(driver_.module_function(&function, module, name.c_str()), "cuModuleGetFunction");
  int registers = 0;
  cuda::check(driver_.function_get(&registers, cuda::kNumRegisters, function),
              "cuFuncGetAttribute");
  return function;
}

void DeviceLanes::add_kernel(const KernelSpec& spec) {
  const Use use(this);
  if (!use) return;
  const cuda::Current current(context_->get());
  auto kernel = std::make_unique<Kernel>();
  kernel->function = load(load_module(spec.code), spec.name);
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
    // Of several, the one with the fewest columns to spare; where top_k is unknown, with the most.
    const bool better = layer.top_k == 0 ? place == nullptr || spec.block_k > place->block_k
                                         : spec.block_k >= layer.top_k &&
                                               (place == nullptr || spec.block_k < place->block_k);
    if (better || spec.form != ChoiceForm::kIds) place = kernel.get();
  }
  kernels_.push_back(std::move(kernel));
}

void DeviceLanes::calibrate_clock(const std::string& name, const std::string& code) {
  constexpr int kTries = 10;  // the first ones warm up
  const Use use(this);
  if (!use) return;
  const cuda::Current current(context_->get());
  cuda::Function function = load(load_module(code), name);
  cuda::Address out = arena_ + places_.clock();
  std::uint64_t shortest = UINT64_MAX;
  std::int64_t offset = 0;
  for (int i = 0; i < kTries; ++i) {
    cuda::Address unused[2] = {0, 0};
    void* params[] = {&out, &unused[0], &unused[1]};
    const std::uint64_t before = monotonic_ns();
    cuda::check(driver_.launch(function, 1, 1, 1, 32, 1, 1, 0, own_stream_, params, nullptr),
                "cuLaunchKernel");
    finish_own_stream();
    const std::uint64_t after = monotonic_ns();
    cuda::check(driver_.copy_to_host(&clock_, out, sizeof(clock_), own_stream_),
                "cuMemcpyDtoHAsync");
    finish_own_stream();
    if (after - before >= shortest) continue;
    shortest = after - before;
    offset = static_cast<std::int64_t>(before + (after - before) / 2 - clock_);
  }
  for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
    write_words(lane_address(lane) + offsetof(ControlBlock, clock_offset_ns), &offset, 2,
                own_stream_);
  }
  finish_own_stream();
}

std::uint64_t DeviceLanes::site_address(std::uint64_t layer) const {
  if (layer >= layers_.size())
    throw std::invalid_argument("no layer " + std::to_string(layer) + " in this recording");
  return arena_ + places_.site(layer);
}

void DeviceLanes::write_words(cuda::Address at, const void* words, std::size_t count,
                              cuda::Stream stream) {
  // No copy: that could read the words later than this returns.
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t word;
    std::memcpy(&word, static_cast<const char*>(words) + i * 4, 4);
    cuda::check(driver_.memset_words(at + i * 4, word, 1, stream), "cuMemsetD32Async");
  }
}

void DeviceLanes::check_lane(std::uint32_t lane) const {
  if (lane < num_lanes()) return;
  throw std::invalid_argument("lane " + std::to_string(lane) + " of a device with " +
                              std::to_string(num_lanes()));
}

void DeviceLanes::switch_off(std::uint64_t site) {
  if (!has_site(site)) return;
  layers_[(site - site_address(0)) / sizeof(Site)].is_off.store(true, std::memory_order_relaxed);
}

void* DeviceLanes::reserve(std::uint32_t lane) {
  check_lane(lane);
  const Use use(this);
  if (use) {  // not in the child of a fork, where another thread may have left the lock taken
    const std::lock_guard<std::mutex> guard(streams_mutex_);
    reserved_[lane] = true;
  }
  return reinterpret_cast<void*>(std::uintptr_t{lane} + 1);  // lane 0 is no null pointer
}

// num_lanes() if there is none. Two streams that ran at once in one lane would lose counts: a
// stream has its lane for itself, until a thread chooses that lane for another one.
std::uint32_t DeviceLanes::lane_of(cuda::Stream stream) {
  const void* chosen = LaneChoice::instead_of(this);
  const std::lock_guard<std::mutex> guard(streams_mutex_);
  if (chosen != nullptr) {
    const auto lane = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(chosen) - 1);
    if (owners_[lane] != stream) owners_[lane].reset();
    return lane;
  }
  std::uint32_t vacant = num_lanes();
  for (std::uint32_t lane = num_lanes(); lane-- > 0;) {
    if (owners_[lane] == stream) return lane;
    if (!owners_[lane].has_value() && !reserved_[lane]) vacant = lane;
  }
  if (vacant < num_lanes()) owners_[vacant] = stream;
  return vacant;
}

// The default stream cannot be captured.
bool DeviceLanes::is_capturing(cuda::Stream stream) const {
  int capturing = 0;
  return stream != nullptr &&
         (driver_.stream_is_capturing(stream, &capturing) != cuda::kSuccess || capturing != 0);
}

RecordResult DeviceLanes::launch(std::uint64_t site, const DeviceTensor& tensor,
                                 cuda::Stream stream, bool recomputed) {
  const Use use(this);
  if (!use) return RecordResult::kIgnored;
  if (!has_site(site)) return RecordResult::kBadSite;
  const std::uint64_t number = (site - site_address(0)) / sizeof(Site);
  const Layer& layer = layers_[number];
  if (layer.is_off.load(std::memory_order_relaxed)) return RecordResult::kIgnored;
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
  const std::uint32_t lane = lane_for(stream);
  if (lane >= num_lanes()) return RecordResult::kNoLane;

  // What differs by lane and layer is an argument, so that the kernel has to look nothing up; what
  // changes while a captured graph lives is in the lane's control block.
  auto data = reinterpret_cast<cuda::Address>(tensor.data);
  cuda::Address control = lane_address(lane);
  cuda::Address totals = arena_ + places_.totals(lane) + layer.board_offset;
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
  return start(kernel->function, programs, kernel->threads, kernel->shared_bytes, stream, params);
}

RecordResult DeviceLanes::start(cuda::Function function, unsigned programs, unsigned threads,
                                unsigned shared_bytes, cuda::Stream stream, void** params) {
  const auto launch = [&] {
    return driver_.launch(function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, params,
                          nullptr);
  };
  cuda::Result result = only_device_ ? launch() : cuda::kInvalidContext;
  if (result == cuda::kInvalidContext) {
    // The thread may have another device current, or, where nothing ran in it yet, none.
    cuda::Context popped = nullptr;
    result = driver_.push(context_->get());
    if (result == cuda::kSuccess) {
      result = launch();
      driver_.pop(&popped);
    }
  }
  return result == cuda::kSuccess ? RecordResult::kRecorded : RecordResult::kDeviceError;
}

// The lane for a launch in a stream, after a look at whether that is a capture.
std::uint32_t DeviceLanes::lane_for(cuda::Stream stream) {
  const std::uint32_t lane = lane_of(stream);
  if (lane < num_lanes() && !captured() && is_capturing(stream))
    captured_.store(true, std::memory_order_relaxed);
  return lane;
}

void DeviceLanes::close(cuda::Stream current_stream) {
  if (!open_.exchange(false)) return;
  device_registry::close(this);
  while (uses_.load() != 0) sched_yield();
  try {
    const cuda::Current current(context_->get());
    switch_all_off(current_stream);
    if (captured()) return;
    release();
  } catch (const cuda::Error& error) {
    if (error.code() == cuda::kDeinitialized) return;  // nothing of the device is left
    // What was launched may still write, so nothing is taken from under it.
    throw;
  }
  context_.reset();
  writer_->release();
}

// Once what was launched is done, clears the magic of all lanes: a graph that is replayed from then
// on finds none and returns. To wait inside a capture would break it.
void DeviceLanes::switch_all_off(cuda::Stream current) {
  int capturing = 0;
  if (current != nullptr && driver_.stream_is_capturing(current, &capturing) == cuda::kSuccess &&
      capturing != 0) {
    captured_.store(true, std::memory_order_relaxed);
  }
  const cuda::Result waited = capturing != 0 ? cuda::kSuccess : driver_.synchronize();
  cuda::Result cleared = cuda::kSuccess;
  for (std::uint32_t lane = 0; lane < num_lanes() && cleared == cuda::kSuccess; ++lane)
    cleared = driver_.memset_words(lane_address(lane), 0, 2, own_stream_);
  cuda::check(waited, "cuCtxSynchronize");
  cuda::check(cleared, "cuMemsetD32Async");
  finish_own_stream();
}

// Takes back what the constructor made, as far as it came; what cannot be taken back is left.
// The context is the thread's.
void DeviceLanes::release() {
  for (cuda::Module module : modules_) driver_.module_unload(module);
  modules_.clear();
  if (own_stream_ != nullptr) driver_.stream_destroy(own_stream_);
  held_.store(false, std::memory_order_relaxed);
  if (arena_ != 0) driver_.free(arena_);  // its address stays: has_site() may be comparing with it
  if (!registered_) return;
  registered_ = false;
  device_registry::File file(file_base_);
  // What the driver still holds must stay mapped.
  if (file.remove_user() && driver_.host_unregister(file_base_) != cuda::kSuccess) writer_->hold();
}

}  // namespace dodoco

// Lanes that race, each written by its own thread, and a reader in another process:
//   recording_race FOLDER LANES SECONDS [wrap]
// `wrap` starts the rings just below the last epoch. Exits 1 if a record was torn, a pass was lost
// without being counted as lost, or a board was not exact.
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <chrono>
#include <iostream>
#include <thread>

#include "race.h"

using namespace race;

namespace {

// The reader's process: reads until the recording is closed, then expects the number of passes that
// each lane has written on its standard input.
int read_all(const std::string& path, const std::vector<std::uint64_t>& starts) {
  const RecordingReader reader(path);
  std::vector<LaneReading> lanes;
  for (std::uint32_t lane = 0; lane < starts.size(); ++lane) lanes.emplace_back(lane, starts[lane]);
  std::cout << "reading" << std::endl;
  while (reader.header().state != static_cast<std::uint32_t>(FileState::kClosed)) {
    for (LaneReading& lane : lanes) lane.read(reader);
  }
  std::uint64_t accepted = 0, lost = 0, written = 0, consistent = 0, in_flight = 0;
  for (LaneReading& lane : lanes) {
    std::uint64_t of_lane = 0;
    std::cin >> of_lane;
    require(lane.is_all_of(reader, of_lane), "accepted + lost = written, and the board is exact");
    require(lane.accepted > 0 && of_lane > 0, "every lane was written and read");
    accepted += lane.accepted;
    lost += lane.lost;
    written += of_lane;
    consistent += lane.consistent;
    in_flight += lane.in_flight;
  }
  check(true, std::to_string(accepted) + " whole + " + std::to_string(lost) +
                  " lost = " + std::to_string(written) + " written; " + std::to_string(consistent) +
                  " exact blocks, " + std::to_string(in_flight) + " in flight");
  return 0;
}

pid_t start_reader(const std::vector<std::string>& arguments, int* to_reader, int* from_reader) {
  int in[2], out[2];
  require(::pipe2(in, O_CLOEXEC) == 0 && ::pipe2(out, O_CLOEXEC) == 0, "pipes");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], 0);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t reader = -1;
  require(::posix_spawn(&reader, "/proc/self/exe", &actions, nullptr, argv.data(), environ) == 0,
          "the reader starts");
  posix_spawn_file_actions_destroy(&actions);
  ::close(in[0]);
  ::close(out[1]);
  *to_reader = in[1];
  *from_reader = out[0];
  return reader;
}

int write_all(const std::string& folder, std::uint32_t num_lanes, int seconds, bool wrap) {
  ::signal(SIGPIPE, SIG_IGN);
  const std::string path = folder + "/race-" + std::to_string(::getpid()) + ".dodoco";
  RecordingWriter writer(spec(path, num_lanes, (128u << 10) + num_lanes * (256u << 10)));
  const std::vector<std::uint64_t> starts =
      wrap ? start_below_the_last_epoch(path) : std::vector<std::uint64_t>(num_lanes, 0);
  std::vector<std::string> arguments = {"recording_race", "--read", path};
  for (const std::uint64_t start : starts) arguments.push_back(std::to_string(start));
  int to_reader, from_reader;
  const pid_t reader = start_reader(arguments, &to_reader, &from_reader);
  char byte;
  require(::read(from_reader, &byte, 1) == 1, "the reader opens the recording");

  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  std::vector<std::uint64_t> written(num_lanes, 0);
  std::vector<std::thread> threads;
  for (std::uint32_t lane = 0; lane < num_lanes; ++lane) {
    threads.emplace_back([&, lane] {
      written[lane] = write_passes(writer.lane(lane), [&](std::uint64_t n) {
        return n % 256 != 0 || std::chrono::steady_clock::now() < end;
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  writer.close();
  std::string line;
  for (std::uint32_t lane = 0; lane < num_lanes; ++lane) {
    line += std::to_string(written[lane]) + " ";
    require(!wrap || written[lane] > (5 + num_lanes) * writer.num_slots(), "the epoch wrapped");
  }
  line += "\n";
  // A reader that has found an error is gone, and what it said is printed below.
  const bool listens =
      ::write(to_reader, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  ::close(to_reader);
  std::string said;
  for (char buffer[256];;) {
    const ssize_t size = ::read(from_reader, buffer, sizeof(buffer));
    if (size <= 0) break;
    said.append(buffer, static_cast<std::size_t>(size));
  }
  int status = 0;
  ::waitpid(reader, &status, 0);
  ::unlink(path.c_str());
  std::cout << num_lanes << " lanes, " << seconds << " s" << (wrap ? ", epoch wraps: " : ": ")
            << said.substr(said.find('\n') + 1) << std::flush;
  return listens && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "--read") {
    std::vector<std::uint64_t> starts;
    for (int i = 3; i < argc; ++i) starts.push_back(std::strtoull(argv[i], nullptr, 10));
    return read_all(argv[2], starts);
  }
  if (argc < 4) {
    std::cerr << "usage: recording_race FOLDER LANES SECONDS [wrap]\n";
    return 2;
  }
  return write_all(argv[1], static_cast<std::uint32_t>(std::atoi(argv[2])), std::atoi(argv[3]),
                   argc > 4);
}

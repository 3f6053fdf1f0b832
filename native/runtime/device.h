// Where programs run: the CPU, a CUDA device, or the emulation of one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace elastiform {

struct Job;

enum class DeviceKind { Cpu = 0, Cuda = 1, Simt = 2 };
constexpr const char* kDeviceNames[] = {"cpu", "cuda", "simt"};

class Device {
 public:
  virtual ~Device() = default;
  // Runs a job on the calling thread, always the same. Errors are left in job.error; nothing is thrown.
  virtual void run(Job& job) = 0;
};

struct DeviceInfo {
  DeviceKind kind;
  bool available;
  std::string description;  // the device's name, or why it is not available and what to do
};
// All kinds, in the order of the enumeration. Never throws, prints or waits long.
std::vector<DeviceInfo> deviceInfos();

// What the emulated device has done in this process, for tests; nothing where there is none.
struct EmulatedWork {
  int64_t launches = 0, prefetches = 0, uploads = 0, uploadedBytes = 0, downloads = 0, depth = 0;
};
EmulatedWork emulatedWork();

// `owned`: bytes held by one JavaScript environment. Error(DeviceUnavailable) with the reason.
std::unique_ptr<Device> makeDevice(DeviceKind kind, std::shared_ptr<std::atomic<int64_t>> owned);

namespace cpu {
std::unique_ptr<Device> makeRunner(std::shared_ptr<std::atomic<int64_t>> owned);
}  // namespace cpu
namespace cuda {
std::unique_ptr<Device> makeRunner(std::shared_ptr<std::atomic<int64_t>> owned);
DeviceInfo describe();
}  // namespace cuda
namespace simt {
std::unique_ptr<Device> makeRunner(std::shared_ptr<std::atomic<int64_t>> owned);
DeviceInfo describe();
}  // namespace simt

}  // namespace elastiform

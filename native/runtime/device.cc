// The devices of this build and machine.
#include "runtime/device.h"

#include "core/error.h"
#include "cpu/kernels.h"
#if defined(ELASTIFORM_WITH_SIMT)
#include "device/executor.h"
#endif

namespace elastiform {

std::vector<DeviceInfo> deviceInfos() {
  std::vector<DeviceInfo> infos{{DeviceKind::Cpu, true, cpu::isaName()}};
#if defined(ELASTIFORM_WITH_CUDA)
  infos.push_back(cuda::describe());
#else
  infos.push_back({DeviceKind::Cuda, false,
                   "this build has no CUDA kernels; on a machine with an NVIDIA driver and nvcc, rebuild with "
                   "npm run build:native -- --CDELASTIFORM_CUDA=ON"});
#endif
#if defined(ELASTIFORM_WITH_SIMT)
  infos.push_back(simt::describe());
#else
  infos.push_back({DeviceKind::Simt, false, "this build does not emulate CUDA (one made in a clone on x86-64 Linux does)"});
#endif
  return infos;
}

EmulatedWork emulatedWork() {
#if defined(ELASTIFORM_WITH_SIMT)
  const simt::Work& work = simt::work();
  return {work.launches, work.prefetches, work.uploads, work.uploadedBytes, work.downloads, work.depth};
#else
  return {};
#endif
}

std::unique_ptr<Device> makeDevice(DeviceKind kind, std::shared_ptr<std::atomic<int64_t>> owned) {
  const DeviceInfo info = deviceInfos()[static_cast<size_t>(kind)];
  if (!info.available) {
    fail(ErrorCode::DeviceUnavailable, "[device] %s cannot be used: %s", kDeviceNames[static_cast<int>(kind)],
         info.description.c_str());
  }
#if defined(ELASTIFORM_WITH_CUDA)
  if (kind == DeviceKind::Cuda) return cuda::makeRunner(std::move(owned));
#endif
#if defined(ELASTIFORM_WITH_SIMT)
  if (kind == DeviceKind::Simt) return simt::makeRunner(std::move(owned));
#endif
  return cpu::makeRunner(std::move(owned));
}

}  // namespace elastiform

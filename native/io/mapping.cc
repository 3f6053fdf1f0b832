// Files mapped read-only into memory: mmap on POSIX, MapViewOfFile on Windows.
#include "io/mapping.h"

#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/memory.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace elastiform {
namespace {

[[noreturn]] void reject(const std::string& path, const std::string& reason) {
  throw Error(ErrorCode::InvalidFile, "[mapFile] " + path + ": " + reason);
}

#ifdef _WIN32

struct Handle {
  HANDLE value = nullptr;
  ~Handle() {
    if (value && value != INVALID_HANDLE_VALUE) CloseHandle(value);
  }
};

std::string lastError() {
  return "Windows error " + std::to_string(GetLastError());
}

void* map(const std::string& path, size_t& bytes) {
  const int length = MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, nullptr, 0);
  std::wstring wide(static_cast<size_t>(length), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, wide.data(), length);
  Handle file{CreateFileW(wide.c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, nullptr, OPEN_EXISTING,
                          FILE_ATTRIBUTE_NORMAL, nullptr)};
  if (file.value == INVALID_HANDLE_VALUE) {
    const DWORD attributes = GetFileAttributesW(wide.c_str());
    const bool folder = attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY);
    reject(path, folder ? "not a regular file" : lastError());
  }
  LARGE_INTEGER size;
  if (GetFileType(file.value) != FILE_TYPE_DISK || !GetFileSizeEx(file.value, &size)) reject(path, "not a regular file");
  if (size.QuadPart == 0) reject(path, "the file is empty");
  Handle mapping{CreateFileMappingW(file.value, nullptr, PAGE_READONLY, 0, 0, nullptr)};
  if (!mapping.value) reject(path, lastError());
  void* data = MapViewOfFile(mapping.value, FILE_MAP_READ, 0, 0, 0);
  if (!data) reject(path, lastError());
  bytes = static_cast<size_t>(size.QuadPart);
  return data;
}

void unmap(void* data, size_t) { UnmapViewOfFile(data); }

// Windows trims the working set by itself.
void evict(void*, size_t, size_t) {}

#else

struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) close(value);
  }
};

void* map(const std::string& path, size_t& bytes) {
  // O_NONBLOCK: opening a FIFO must not wait for its other end.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.value < 0) reject(path, std::strerror(errno));
  struct stat status;
  if (fstat(file.value, &status) != 0) reject(path, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) reject(path, "not a regular file");
  if (status.st_size == 0) reject(path, "the file is empty");
  bytes = static_cast<size_t>(status.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.value, 0);
  if (data == MAP_FAILED) reject(path, std::strerror(errno));
  return data;
}

void unmap(void* data, size_t bytes) { munmap(data, bytes); }

// Advice: whole pages inside [offset, offset + bytes) leave this process, not the page cache.
void evict(void* data, size_t offset, size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t first = (offset + page - 1) / page * page, last = (offset + bytes) / page * page;
  if (first < last) madvise(static_cast<uint8_t*>(data) + first, last - first, MADV_DONTNEED);
}

#endif

}  // namespace

std::shared_ptr<Storage> mapFile(const std::string& path) {
  auto storage = std::make_shared<Storage>();
  size_t bytes = 0;
  void* data = map(path, bytes);
  storage->data = static_cast<uint8_t*>(data);
  storage->bytes = bytes;
  memoryCounters().mappedBytes += static_cast<int64_t>(bytes);
  storage->release = [data, bytes] {
    unmap(data, bytes);
    memoryCounters().mappedBytes -= static_cast<int64_t>(bytes);
  };
  storage->evict = [data](size_t offset, size_t count) { evict(data, offset, count); };
  return storage;
}

}  // namespace elastiform

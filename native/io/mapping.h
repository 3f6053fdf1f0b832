// Files mapped read-only into memory.
#pragma once

#include <memory>
#include <string>

#include "core/tensor.h"

namespace elastiform {

// Maps the whole of a regular, non-empty file; Error(InvalidFile) names the path and the reason. `path` is UTF-8.
// The file must not be truncated while it is mapped: the system answers a read past its new end with SIGBUS.
std::shared_ptr<Storage> mapFile(const std::string& path);

}  // namespace elastiform

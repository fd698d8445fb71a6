// The table of CUDA entry points: one pointer for each line of functions.def.
//
// Kept apart from libcuda.hpp, which fills it, so that tests can fill one of their own and compare it with the toolkit's types.
// Thread: any; a filled table does not change.
#pragma once

#include "cuda/cuda_types.hpp"

namespace vattn::cuda {

/// An optional entry that the library lacks is null; required ones never are once Libcuda::open() returned.
struct Functions {
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) CUresult(*name) parameters = nullptr;
#include "cuda/functions.def"
};

}  // namespace vattn::cuda

// The prototypes of the fake's entry points, made from the list that the library itself uses and from that of other programs:
// an entry added to either does not link here until it is implemented, and one with another signature does not compile. Thread:
// any, as in the real library.
#pragma once

#include "client_types.hpp"
#include "cuda/cuda_types.hpp"

namespace fake_cuda {

using namespace vattn::cuda;  // NOLINT(google-build-using-namespace): CUDA's own names

#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) CUresult name parameters;
#include "cuda/functions.def"
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) CUresult name parameters;
#include "client_functions.def"

}  // namespace fake_cuda

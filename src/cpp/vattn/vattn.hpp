// The library, whole: #include <vattn/vattn.hpp>.
#pragma once

#include "vattn/driver/open.hpp"
#include "vattn/dtype.hpp"
#include "vattn/error.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/dlpack.hpp"
#include "vattn/tensor/growable_tensor.hpp"
#include "vattn/version.hpp"

// vattn._core: the extension module. One file a topic binds its part; none holds logic.
//
// Every call that can reach a driver, or wait for a lock that is held over driver calls, releases the GIL.
#include "bindings/bindings.hpp"
#include "vattn/version.hpp"

NB_MODULE(_core, module) {
  module.doc() = "The native part of vattn. Use the classes of the package itself.";
  // At interpreter exit tensors may outlive their modules; that is no leak worth a warning to a user.
  nb::set_leak_warnings(false);
  module.def("version", &vattn::version, "The version of the library that is loaded.");
  bind_errors(module);
  bind_system(module);
  bind_page_pool(module);
  bind_kv_cache(module);
  bind_growable_tensor(module);
}

// C++ exceptions become the classes of vattn.errors, with their attributes.
#include <new>

#include "bindings/bindings.hpp"

namespace {

nb::object make(const char* type, const char* message) { return nb::module_::import_("vattn.errors").attr(type)(message); }

void raise(const nb::object& error) { PyErr_SetObject(error.type().ptr(), error.ptr()); }

void translate(const std::exception_ptr& caught, void* /*payload*/) {
  try {
    std::rethrow_exception(caught);
  } catch (const vattn::OutOfMemoryError& error) {
    const nb::object made = make("OutOfMemoryError", error.what());
    made.attr("needed_bytes") = error.needed_bytes;
    made.attr("available_bytes") = error.available_bytes;
    made.attr("limit_bytes") = error.limit_bytes;
    made.attr("held_by_others_bytes") = error.held_by_others_bytes;
    raise(made);
  } catch (const vattn::DriverError& error) {
    const nb::object made = make("DriverError", error.what());
    made.attr("call") = error.call;
    made.attr("code") = error.code;
    made.attr("name") = error.name;
    raise(made);
  } catch (const vattn::NoFreeSlotError& error) {
    raise(make("NoFreeSlotError", error.what()));
  } catch (const vattn::ClosedError& error) {
    raise(make("ClosedError", error.what()));
  } catch (const vattn::InUseError& error) {
    raise(make("InUseError", error.what()));
  } catch (const vattn::Error& error) {
    raise(make("Error", error.what()));
  } catch (const std::overflow_error& error) {
    PyErr_SetString(PyExc_OverflowError, error.what());
  }
}

}  // namespace

void bind_errors(nb::module_& /*module*/) { nb::register_exception_translator(translate, nullptr); }
